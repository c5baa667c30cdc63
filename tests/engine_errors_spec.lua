-- What the engine says of bad arguments through the C interface: a status, the documented words, and no
-- memory left behind; and a few thousand calls with random garbage. See support/engine.lua.

local d = require "support.cdirect"
local engine = require "support.engine"
local C, ffi = d.C, d.ffi
local tensor, shape_of, op, call = d.tensor, d.shape, d.op, d.call
local INF, NAN, random, fails = engine.INF, engine.NAN, engine.random, engine.fails

describe("engine errors:", function()
  local f = function(...) return d.empty("f32", { ... }) end
  local i64 = function(...) return d.empty("i64", { ... }) end
  local half = function(...) return d.empty("f16", { ... }) end

  it("name both sides and the offending value", function()
    local exp, add = C.lac_map_id(1, "exp"), C.lac_map_id(2, "add")
    local o = d.out()
    fails("argument", "function id 999", "map1", 999, f(2), o)
    fails("argument", "x is missing", "map1", exp, nil, o)
    fails("argument", "no tensor to fill", "map1", exp, f(2), nil)
    fails("dtype", "exp: x must be a floating%-point.*i64", "map1", exp, i64(2), o)
    fails("dtype", "neg: not defined for bool", "map1", C.lac_map_id(1, "neg"), d.empty("bool", { 2 }), o)
    fails("dtype", "and: x must be bool, got f32", "map2", C.lac_map_id(2, "and"), f(2), f(2), o)
    fails("dtype", "add: x is f32 but y is f16", "map2", add, f(2), half(2), o)
    fails("shape", "%[2, 3%].*%[4%].*3 != 4", "map2", add, f(2, 3), f(4), o)
    fails("argument", "0.5 is not a value of dtype i64", "map2_scalar", add, i64(2), 0.5, 0, o)
    fails("argument", "nan is not a value", "map2_scalar", add, i64(2), NAN, 0, o)
    fails("argument", "has no gradient", "map2_bwd", C.lac_map_id(2, "lt"), 0, f(2), f(2), f(2), o)
    fails("argument", "argument 2, expected 0 or 1", "map2_bwd", add, 2, f(2), f(2), f(2), o)
    fails("shape", "the result is %[2, 3%] but g is %[3%]", "map2_bwd", add, 0, f(2, 3), f(3), f(3), o)
    fails("dtype", "cond must be bool, got f32", "where", f(2), f(2), f(2), o)
    fails("shape", "x %[3%] does not broadcast to dst %[2%]", "axpy", 1, f(3), f(2))
    fails("argument", "300 is not a value of dtype u8", "fill", d.empty("u8", { 2 }), 300)
    fails("shape", "src %[2, 2%] does not broadcast to dst %[2%]", "copy", f(2, 2), f(2))
    fails("shape", "one dimension", "arange", f(2, 2), 0, 1)
    fails("argument", "the last value 299", "arange", d.empty("u8", { 300 }), 0, 1)
    fails("argument", "function id %-1", "reduce", -1, f(2), 0, 0, o)
    fails("argument", "reach past", "reduce", 0, f(2), 2, 0, o)
    fails("argument", "one dimension or all", "reduce", 6, f(2, 2, 2), 3, 0, o)
    fails("dtype", "mean: x must be a floating", "reduce", 1, i64(2), 0, 0, o)
    fails("shape", "like %[3%] does not broadcast to x %[2%]", "sum_to", f(2), f(3), o)
    fails("argument", "dimension 4 of a tensor with 2", "softmax", f(2, 2), 3, 0, o)
    fails("argument", "softmax: dimension", "softmax", f(), 0, 0, o)
    fails("shape", "y is %[2%] but g is %[3%]", "softmax_bwd", f(2), f(3), 0, 0, o)
    fails("shape", "3 != 4", "matmul", f(2, 3), f(4, 2), nil, o)
    fails("shape", "at least 2 dimensions", "matmul", f(3), f(3, 2), nil, o)
    fails("shape", "bias must be %[2%].*got %[3%]", "matmul", f(2, 3), f(3, 2), f(3), o)
    fails("dtype", "a must be a floating", "matmul", i64(2, 2), i64(2, 2), nil, o)
    fails("shape", "do not broadcast", "matmul", f(2, 2, 3), f(3, 3, 2), nil, o)
    for _, c in ipairs{ { "shape", "to be added to, got %[2, 3%]", f(2, 3) },
      { "shape", "to be added to", d.transpose(f(2, 2), 0, 1) },
      { "dtype", "out", tensor("f64", { 2, 2 }, { 1, 2, 3, 4 }) } } do
      fails(c[1], c[2], "matmul", f(2, 3), f(3, 2), c[3], c[3])
    end
    local o2, o3 = d.out(), d.out()
    fails("argument", "eps must be positive and finite, got 0", "layernorm", f(2, 3), nil, nil, 0, o, o2, o3)
    fails("argument", "got %-?nan", "layernorm", f(2, 3), nil, nil, NAN, o, o2, o3)
    fails("shape", "gamma must be %[3%]", "layernorm", f(2, 3), f(2), nil, 1e-5, o, o2, o3)
    fails("shape", "last dimension of at least one", "layernorm", f(2, 0), nil, nil, 1e-5, o, o2, o3)
    fails("argument", "there is no gamma", "layernorm_bwd", f(2, 3), nil, f(2), f(2), f(2, 3), o, o2, nil)
    fails("shape", "mean must be f32 %[2%]", "layernorm_bwd", f(2, 3), nil, f(3), f(2), f(2, 3), o, nil, nil)
    fails("dtype", "target is f16", "cross_entropy", f(2, 3), half(2, 3), nil, 0, 0, o, o2)
    fails("shape", "target is %[2%]", "cross_entropy", f(2, 3), f(2), nil, 0, 0, o, o2)
    fails("shape", "weight must be %[3%]", "cross_entropy", f(2, 3), i64(2), f(2), 0, 0, o, o2)
    fails("argument", "smoothing must be in %[0, 1%], got 2", "cross_entropy", f(2, 3), i64(2), nil, 0, 2, o,
      o2)
    fails("shape", "target must be %[2%]", "cross_entropy", f(2, 3), i64(3), nil, 0, 0, o, o2)
    fails("shape", "at least one class", "cross_entropy", f(2, 0), i64(2), nil, 0, 0, o, o2)
    fails("shape", "losses must be %[rows%] in f32 or f64, got %[2%] of f16", "loss_mean", half(2), i64(2),
      nil, 0, o, o2)
    fails("shape", "target must be %[2%]", "loss_mean", f(2), i64(3), nil, 0, o, o2)
    fails("shape", "weight must be %[classes%]", "loss_mean", f(2), i64(2), f(2, 2), 0, o, o2)
    fails("index", "target number 2 is 5", "loss_mean", f(2), tensor("i64", { 2 }, { 0, 5 }), f(3), -100, o,
      o2)
    fails("argument", "chunk must be at least 1", "linear_cross_entropy", f(2, 3), f(4, 3), nil, i64(2), nil,
      0, 0, -1, o, o2)
    fails("argument", "no place for dbias", "linear_cross_entropy_bwd", f(2, 3), f(4, 3), f(4), i64(2), nil,
      0, 0, 0,
      f(2), f(2), o, o2, nil)
    fails("argument", "there is no bias", "linear_cross_entropy_bwd", f(2, 3), f(4, 3), nil, i64(2), nil, 0,
      0, 0,
      f(2), f(2), o, o2, o3)
    fails("dtype", "lse must be f32", "cross_entropy_bwd", half(2, 3), i64(2), nil, 0, 0, half(2), f(2), o)
    fails("dtype", "index must be i64 or i32", "index_select", f(2), 0, f(2), o)
    fails("shape", "at most 6", "index_select", f(1, 1, 1, 1), 0, i64(1, 1, 1, 1), o)
    fails("shape", "does not have the axes of index", "index_select_bwd", f(2, 3), 0, i64(3), 4, o)
    fails("argument", "must not be negative, got %-1", "index_select_bwd", f(2, 3), 0, i64(2), -1, o)
    fails("shape", "same sizes except in dimension 1", "gather", f(2, 3), 0, i64(2, 2), o)
    fails("shape", "rope: x must be %[batch", "rope", f(2, 3), nil, 0, 1e4, 0, 0, 1, 0, o)
    fails("shape", "even, got 3", "rope", f(1, 1, 1, 3), nil, 0, 1e4, 0, 0, 1, 0, o)
    fails("argument", "base must be finite and above 1, got 1", "rope", f(1, 1, 1, 4), nil, 0, 1, 0, 0, 1, 0,
      o)
    fails("argument", "sign must be", "rope", f(1, 1, 1, 4), nil, 0, 1e4, 0, 512, 0, 0, o)
    fails("argument", "a < b, got a = 1, b = 1", "random", f(2), 0, 1, 1, 1, 1)
    fails("argument", "deviation >= 0", "random", f(2), 1, 0, -1, 1, 1)
    fails("argument", "in %[0, 1%], got 1.5", "random", f(2), 2, 1.5, 0, 1, 1)
    fails("argument", "whole bounds", "random", f(2), 3, 0.5, 3, 1, 1)
    fails("argument", "unknown kind 9", "random", f(2), 9, 0, 1, 1, 1)
    fails("argument", "outside the range of f16", "random", half(2), 0, 0, 1e6, 1, 1)
    fails("argument", "in %[0, 1%), got 1", "dropout", f(2), 1, 1, 1, o)
    fails("argument", "got %-?nan", "dropout", f(2), NAN, 1, 1, o)
  end)

  it("AdamW and the norm check everything before they write", function()
    local function item(p, g, m, v, lr) return ffi.new("lac_optim_item[1]", { { p, g, m, v, lr or 0.1,
      0 } }) end
    local function run(a, n, b1, b2, eps, step) return a, n or 1, b1 or 0.9, b2 or 0.99, eps or 1e-8, 0,
      step or 1, 1, 0 end
    local p, g, m, v = f(3), f(3), f(3), f(3)
    local keep = { p, g, m, v, f(2), half(3), half(3), d.expand(f(1), { 3 }), i64(3) }
    fails("argument", "list of items is missing", "adamw_many", run(nil))
    fails("argument", "a list of %-1 items", "adamw_many", run(item(p, g, m, v), -1))
    fails("argument", "grad of item 1 is missing", "adamw_many", run(item(p, nil, m, v)))
    fails("shape", "the parameter is %[3%] but m of item 1 is %[2%]", "adamw_many", run(item(p, g, keep[5],
      v)))
    fails("dtype", "grad of item 1 must be f32", "adamw_many", run(item(p, keep[6], m, v)))
    fails("dtype", "m of item 1 must be f32 for a f16", "adamw_many", run(item(keep[6], keep[7], keep[6], v)))
    fails("argument", "must be contiguous", "adamw_many", run(item(p, keep[8], m, v)))
    fails("argument", "param and m of item 1 overlap", "adamw_many", run(item(p, g, p, v)))
    fails("dtype", "floating", "adamw_many", run(item(keep[9], g, m, v)))
    fails("argument", "lr must be finite", "adamw_many", run(item(p, g, m, v, INF)))
    fails("argument", "beta1 and beta2", "adamw_many", run(item(p, g, m, v), 1, 1))
    fails("argument", "eps must be", "adamw_many", run(item(p, g, m, v), 1, nil, nil, NAN))
    fails("argument", "steps count from 1, got 0", "adamw_many", run(item(p, g, m, v), 1, nil, nil, nil, 0))
    fails("argument", "adam: eps must be", "adamw_many", item(p, g, m, v), 1, 0.9, 0.9, NAN, 1, 1, 1, 0)
    fails("argument", "grad_scale must be finite", "adamw_many", item(p, g, m, v), 1, 0.9, 0.9, 1, 0, 1,
      INF, 0)
    fails("argument", "grad_limit must be", "lion_many", item(p, g, m, nil), 1, 0.9, 0.9, 1, -1)
    fails("argument", "lion: beta1 and beta2 must be in %[0, 1%)", "lion_many", item(p, g, m, nil), 1, 1, 0,
      1, 0)
    fails("argument", "lion: m of item 1 is missing", "lion_many", item(p, g, nil, nil), 1, 0, 0, 1, 0)
    local function sgd(a, momentum, dampening, nesterov, step)
      return "sgd_many", a, 1, momentum, dampening or 0, nesterov or 0, 1, step or 1, 1, 0
    end
    fails("argument", "momentum must be in %[0, 1%), got 1", sgd(item(p, g, m, nil), 1))
    fails("argument", "dampening must be in %[0, 1%], got 2", sgd(item(p, g, m, nil), 0.5, 2))
    fails("argument", "nesterov needs momentum", sgd(item(p, g, m, nil), 0, 0, 1))
    fails("argument", "steps count from 1, got 0", sgd(item(p, g, m, nil), 0, 0, 0, 0))
    fails("argument", "m of item 1 is missing", sgd(item(p, g, nil, nil), 0.5))
    local function master(q, h, t) return ffi.new("lac_optim_item[1]", { { q, h, m, v, 0.1, 0, t } }) end
    fails("dtype", "master copy, which is for f16 and bf16, but the parameter is f32",
      sgd(master(p, g, f(3)), 0))
    fails("dtype", "master of item 1 must be f32", sgd(master(keep[6], keep[7], half(3)), 0))
    fails("shape", "master of item 1 is %[2%]", sgd(master(keep[6], keep[7], keep[5]), 0))
    local norm = ffi.new("double[1]")
    fails("argument", "nowhere to put", "norm_many", nil, 0, nil)
    fails("argument", "tensor 1 is missing", "norm_many", ffi.new("const lac_tensor *[1]"), 1, norm)
    fails("argument", "list of tensors is missing", "norm_many", nil, 1, norm)
  end)

  it("released, dead and impossible tensors are refused", function()
    local o, exp = d.out(), C.lac_map_id(1, "exp")
    local t = f(3)
    call("tensor_release", t)
    fails("released", "after release", "map1", exp, t, o)
    fails("released", "no storage", "map1", exp, ffi.new("lac_tensor"), o)
    local wild = d.view(f(3))
    wild.shape[0] = 4
    fails("shape", "outside its storage", "map1", exp, wild, o)
    wild.shape[0], wild.offset = 0, 2 ^ 50 -- no element, so nothing is anywhere
    assert.are.same({ 0 }, shape_of(op("map1", exp, wild)))
    wild.offset = 0
    wild.shape[0] = -1
    fails("shape", "negative size", "map1", exp, wild, o)
    wild.shape[0], wild.dtype = 3, 77
    fails("dtype", "unknown dtype 77", "map1", exp, wild, o)
    local huge = d.view(f(3))
    huge.ndim = 2
    huge.shape[0], huge.shape[1], huge.stride[0], huge.stride[1] = 2 ^ 40, 2 ^ 40, 0, 0
    fails("shape", "more elements than 64 bits", "map1", exp, huge, o)
    fails("shape", "more elements than 64 bits", "reduce", 0, huge, 0, 0, o)
    huge.shape[0] = 2 ^ 10
    fails("memory", "", "map1", exp, huge, o)
    local single = d.view(f(3)) -- nobody follows the stride of an axis of one
    single.ndim = 2
    single.shape[0], single.shape[1], single.stride[0], single.stride[1] = 1, 3, -2 ^ 63, 1
    assert.are.same({ 1, 3 }, shape_of(op("map1", exp, single)))
    assert.are.same({ 1 }, shape_of(op("reduce", 0, single, 2, 0)))
  end)

  -- a short operator runs to its end and drops its result: if it succeeded, a host that stops then would
  -- leave a tensor that nobody owns
  it("an interrupt stops long work, and fails short work without losing its result", function()
    local x, threads = d.empty("f32", { 1500, 1500 }), C.lac_threads(0)
    local stats = ffi.new("lac_memory_stats")
    call("fill", x, 1)
    C.lac_threads(2) -- with many threads each has one piece, and a piece that has begun is finished
    C.lac_interrupt(1)
    local ok, message = pcall(op, "map1", C.lac_map_id(1, "exp"), x)
    local three = f(3)
    C.lac_memory(0, stats)
    local live = stats.live
    local small, why = pcall(op, "map1", C.lac_map_id(1, "exp"), three)
    C.lac_memory(0, stats)
    local after = stats.live
    C.lac_interrupt(0)
    C.lac_threads(threads)
    assert.is_false(ok)
    assert.is_truthy(message:find("interrupted: "))
    assert.is_false(small)
    assert.is_truthy(why:find("interrupted: "))
    assert.are.equal(live, after)
    assert.are.equal(1500, op("map1", C.lac_map_id(1, "exp"), x).shape[0])
  end)

  it("garbage never crashes, leaks or writes outside", function()
    local pick = function(list) return list[1 + math.floor(random() * #list)] end
    local integers = { -2147483648, -3, -1, 0, 0, 1, 1, 2, 3, 5, 7, 100, 2147483647 }
    local numbers = { 0, 1, -1, 0.5, 2, 1e-5, 1e300, -1e300, INF, -INF, NAN, 3, 10000 }
    local function wild()
      local r = random()
      if r < 0.03 then return nil end
      if r < 0.06 then return ffi.new("lac_tensor") end
      local shape = {}
      for i = 1, math.floor(random() * 5) do shape[i] = pick { 0, 1, 1, 2, 2, 3, 4 } end
      local t = d.empty(pick { "f32", "f32", "f32", "f64", "bf16", "f16", "i64", "i32", "u8", "bool" }, shape)
      call("fill", t, math.floor(random() * 2))
      if r < 0.3 and t.ndim > 0 then
        local axis = math.floor(random() * t.ndim)
        local v = d.view(t)
        local which = random()
        if which < 0.3 then v.stride[axis] = pick { 0, -1, 2, 2 ^ 62, -2 ^ 63 }
        elseif which < 0.5 then v.shape[axis] = pick { 0, 1, -5, 9, 2 ^ 40, 2 ^ 62 }
        elseif which < 0.6 then v.offset = pick { -1, 1, 2 ^ 62 }
        elseif which < 0.7 then v.dtype = pick { -1, 8, 2, 0 }
        elseif which < 0.8 then v.ndim = pick { -1, 7, 0, 6 }
        elseif which < 0.9 then v.device = pick { 256, -1, 3 }
        else return d.transpose(t, 0, t.ndim - 1) end
        return v
      end
      return t
    end
    local T, O, I, N = wild, d.out, function() return pick(integers) end, function() return pick(numbers) end
    local small = function() return math.floor(random() * 8) end
    local function L() -- sizes for each axis
      local list = ffi.new("int64_t[6]")
      for i = 0, 5 do list[i] = pick { 0, 0, 1, 1, 2, 3, -1, 2 ^ 40, -2 ^ 62 } end
      return list
    end
    local calls = {
      { "map1", function() return math.floor(random() * 30) end, T, O }, { "map1_bwd", I, T, T, T, O },
        { "map2", small, T, T, O },
      { "map2_scalar", small, T, N, I, O }, { "map2_bwd", small, small, T, T, T, O }, { "map2_scalar_bwd",
      small, T, N, I, T, O },
      { "where", T, T, T, O }, { "axpy", N, T, T }, { "scale", N, T }, { "fill", T, N }, { "copy", T, T },
      { "arange", T, N, N },
      { "reduce", small, T, small, I, O }, { "sum_to", T, T, O }, { "softmax", T, I, I, O }, { "softmax_bwd",
      T, T, I, I, O },
      { "matmul", T, T, T, O }, { "layernorm", T, T, T, N, O, O, O }, { "layernorm_bwd", T, T, T, T, T, O, O,
      O },
      { "loss_mean", T, T, T, I, O, O },
      { "cross_entropy", T, T, T, I, N, O, O }, { "cross_entropy_bwd", T, T, T, I, N, T, T, O },
      { "linear_cross_entropy", T, T, T, T, T, I, N, I, O, O },
      { "linear_cross_entropy_bwd", T, T, T, T, T, I, N, I, T, T, O, O, O },
      { "linear_cross_entropy_both", T, T, T, T, T, I, N, I, T, O, O, O, O },
      { "residual_norm", T, T, T, T, N, N, I, I, O, O, O, O },
      { "residual_norm_bwd", T, T, T, T, T, T, N, I, I, O, O, O, O },
      { "gelu_norm", T, T, T, N, O, O, O, O }, { "gelu_norm_bwd", T, T, T, T, T, T, T,
        N, O, O, O, O, O },
      { "linear_act", I, T, T, T, O, O }, { "linear_act_bwd", I, T, T, T, O, O, O },
      { "weight_grad", T, T, O, O },
      { "sort", T, small, small, O, O }, { "topk", T, small, small, small, O, O },
      { "searchsorted", T, T, small, O }, { "runs", T, T, O, O }, { "nonzero", T, O },
      { "scatter", T, small, T, T, small, small }, { "index_put", T, small, T, T, small, N },
      { "pad", T, L, L, small, N, O }, { "pad_bwd", T, L, L, small, O },
      { "conv1d", T, T, T, small, small, small, small, O }, { "conv1d_bwd", T, T, T, small, small, small, O,
        O },
      { "multinomial", T, small, small, small, small, O },
      { "index_select", T, small, T, O }, { "index_select_bwd", T, small, T, small, O }, { "gather", T,
      small, T, O },
      { "gather_bwd", T, small, T, small, O }, { "rope", T, T, I, N, I, N, I, I, O }, { "random", T, small, N,
      N, small, small },
      { "dropout", T, N, small, small, O }, { "empty", T }, { "tensor_check", T },
    }
    collectgarbage()
    local broken = C.lac_memory_guard_errors() -- another spec breaks a block on purpose
    C.lac_memory_guard(1)
    local accepted, refused = 0, 0
    for round = 1, 100 do
      for _, c in ipairs(calls) do
        local args, n = {}, #c - 1
        for i = 1, n do args[i] = c[i + 1]() end
        -- empty() replaces the storage of a live tensor and would leak it; a fresh struct has none
        if c[1] == "empty" and args[1] ~= nil then
          local fresh = d.out()
          fresh.dtype, fresh.device, fresh.ndim = args[1].dtype, args[1].device, args[1].ndim
          for i = 0, 5 do fresh.shape[i] = args[1].shape[i] end
          args[1] = fresh
        end
        local status = C["lac_" .. c[1]](unpack(args, 1, n))
        if status == 0 then accepted = accepted + 1 else refused = refused + 1 end
        if status ~= 0 then assert.is_true(#d.last_error() > 10, c[1]) end
        assert.are_not.equal("internal", ffi.string(C.lac_status_name(status)), c[1] .. ": "
          .. d.last_error())
      end
      if round % 20 == 0 then collectgarbage() end
    end
    C.lac_memory_guard(0)
    collectgarbage()
    assert.are.equal(broken, C.lac_memory_guard_errors())
    assert.is_true(accepted > 300 and refused > 300, accepted .. " accepted, " .. refused .. " refused")
  end)
end)
