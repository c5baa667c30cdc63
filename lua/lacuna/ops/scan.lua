--- Scans: running sums, products, extremes and log-sum-exps along a dimension.
--
-- Element i of the result is the reduction of elements 1 to i of its line, accumulated in f64 in their order
-- by one thread, so a result never depends on the number of threads. Dtypes are those of the reductions: sums
-- and products of integers and bools are i64, extremes keep the dtype, log-sum-exps want floats.
--
-- Gradients: a running sum's is the running sum of g from the other end. A product's and a log-sum-exp's are
-- kernels that walk the line backwards and never divide, so zeros in a product and large exponents are exact.
-- An extreme's goes to the element that is shown: gather's rule at its position. Rejected: reverse scans as
-- an option (flip before and after says it; PyTorch has none).

local lib = require "lacuna.lib"
local tensor = require "lacuna.tensor"
local ops = require "lacuna.ops.base"

local C, call = lib.C, lib.call
local adopt, expect, axis = tensor.adopt, tensor.expect, tensor.axis
local internal = ops.internal
local record1, wants, new, define = internal.record1, internal.wants, internal.new, internal.define
local finish_taken, at_positions = internal.finish_taken, internal.at_positions

local function define_scan(name, kind, saves, backward)
  local op = { name = name, saves = saves, backward = backward }
  function op.forward(x, dim)
    expect(name, "x", x)
    local k = axis(name, x, dim == nil and -1 or dim)
    local c = new()
    call(C.lac_scan, kind, x.c, k, 0, c, nil)
    local out = adopt(c)
    if wants(x) then
      record1(op, out, x)
      out.node.k = k
    end
    return out
  end
  define(op)
end

local function by_kernel(kind)
  return function(node, g)
    local c = new()
    call(C.lac_scan_bwd, kind, node.a.c, node.o.c, g.c, node.k, c)
    return adopt(c)
  end
end

--- cumsum(x, dim): running sums along dim (the last unless given); i64 for integers and bools.
define_scan("cumsum", C.LAC_CUMSUM, "", function(node, g)
  local c = new()
  call(C.lac_scan, C.LAC_CUMSUM, g.c, node.k, 1, c, nil)
  return adopt(c)
end)
--- cumprod(x, dim): running products along dim (the last unless given); i64 for integers and bools. The
-- gradient is exact where elements are zero.
define_scan("cumprod", C.LAC_CUMPROD, "ao", by_kernel(C.LAC_CUMPROD))
--- logcumsumexp(x, dim): log(cumsum(exp(x))) along dim (the last unless given), without overflow; -inf as
-- long as every element so far is -inf.
define_scan("logcumsumexp", C.LAC_LOGCUMSUMEXP, "ao", by_kernel(C.LAC_LOGCUMSUMEXP))

local function define_extreme(name, kind)
  local op = { name = name, backward = at_positions }
  function op.forward(x, dim)
    expect(name, "x", x)
    local k = axis(name, x, dim == nil and -1 or dim)
    local values, index = new(), new()
    call(C.lac_scan, kind, x.c, k, 0, values, index)
    return finish_taken(op, x, k, values, index)
  end
  define(op)
end
--- cummax(x, dim): the largest element so far along dim (the last unless given), and where it is: an index
-- tensor (i64, 0-based; the latest of equals). NaN wins from its place on.
define_extreme("cummax", C.LAC_CUMMAX)
--- cummin(x, dim): the smallest element so far, and where it is; as cummax.
define_extreme("cummin", C.LAC_CUMMIN)
