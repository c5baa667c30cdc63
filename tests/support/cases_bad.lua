--- What operators refuse whose cases say no more than what they compute: calls, with what they raise.
--
-- Written like `bad` in cases.lua, and given to the first case of the name. ops_spec fails for an operator
-- without any.

return function(cases)
  local function call(name, argument, pattern)
    return { function(_, x) return x[name](x, argument) end, name .. ": " .. pattern }
  end
  local function not_called_on(name)
    return { function(lac) return lac[name] "no" end, name .. ": must be called on a tensor.*, got 'no'" }
  end
  local function surplus(name) return call(name, 3, "takes %(x%), got 3 as well") end

  local BAD = {
    softmax = { call("softmax", 3, "dim 3 is out of range for Tensor f32 %[3 x 4%]"),
                { function(lac) return lac.ones { 2, dtype = "i64" }:softmax(1) end,
                  "softmax: x must be a floating%-point tensor" } },
    log_softmax = { call("log_softmax", 0, "dim 0 is out of range"),
                    call("log_softmax", 1.5, "dim must be an integer, got 1.5") },
    bitwise_not = { { function(lac) return lac.bitwise_not(lac.ones { 2 }) end,
                      "bitwise_not: x must be i64, i32 or u8, got f32" } },
    logical_not = { { function(lac) return lac.logical_not(lac.ones { 2 }) end,
                      "not: x must be bool, got f32; compare it first" } },
    tril = { call("tril", 0.5, "the diagonal must be an integer, got 0.5"),
             { function(lac) return lac.ones { 3 }:tril() end, "tril: needs 2 dimensions or more" } },
    triu = { call("triu", "a", "the diagonal must be an integer, got 'a'") },
    squeeze = { call("squeeze", 5, "dim 5 is out of range") },
    flatten = { { function(_, x) return x:flatten(2, 1) end, "first dim 2 comes after last dim 1" } },
    reshape = { call("reshape", 5, "shape %[5%] has 5 elements") },
    expand_as = { call("expand_as", 3, "like must be a tensor, got 3"),
                  { function(lac, x) return x:expand_as(lac.ones { 3 }) end, "cannot be expanded to" } },
    select = { { function(_, x) return x:select(1, 4) end, "position 4 is out of range in dimension 1" } },
    chunk = { call("chunk", 0, "n must be positive, got 0"),
              { function(_, x) return x:chunk(2, 3) end, "chunk: dim 3 is out of range" } },
    stack = { { function(lac) return lac.stack {} end, "stack: the list of tensors is empty" },
              { function(lac, x) return lac.stack { x, x:t() } end, "stack: tensors must have one shape" },
              { function(lac, x) return lac.stack(x) end, "stack: expected a list of tensors, got Tensor" } },
    elu = { call("elu", "a", "alpha must be a number, got 'a'") },
    max_pool1d = { call("max_pool1d", 9, "windows of 9 do not fit into the last dimension"),
                   { function(_, x) return x:max_pool1d(2, { padding = 2 }) end,
                     "padding must be at most half of the size 2, got 2" } },
    masked_fill = { { function(_, x) return x:masked_fill(x, 1) end,
                      "masked_fill: mask must be bool, got Tensor f32 .*; compare it first" },
                    { function(lac, x) return lac.no_grad(function() return x:masked_fill_(x, 1) end) end,
                      "masked_fill_: mask must be bool, got Tensor f32 .*; compare it first" },
                    { function(_, x, m) return x:masked_fill(m) end, "value must be a number, got nil" } },
    gather = { { function(_, x) return x:gather(2, x) end, "gather: index must be i64 or i32, got f32" },
               { function(_, x, i) return x:gather(2, i + 9) end, "index number 1 is .*, outside 0..3" },
               { function(_, x, i) return x:gather(2, i[1]) end, "must have the same sizes except in dim" } },
    scatter_add = { { function(_, x, i, s) return x:scatter_add(2, i - 99, s) end, "index number 1 is %-" },
                    { function(_, x, i) return x:scatter_add(2, i) end, "scatter_add: src must be" } },
    index_copy = { { function(_, x, i, s) return x:index_copy(2, i:unsqueeze(1), s) end,
                     "the index must have one dimension" },
                   { function(_, x, i, s) return x:index_copy(2, i, s[1]:narrow(1, 1, 2)) end,
                     "does not broadcast to the indexed part" } },
    nonzero = { surplus "nonzero" },
  }
  for _, name in ipairs { "clone", "contiguous", "detach", "int", "long", "byte", "bool" } do
    BAD[name] = { not_called_on(name), surplus(name) }
  end

  for _, case in ipairs(cases.list) do
    if BAD[case.name] then
      assert(not case.bad, case.name .. " says itself what it refuses")
      case.bad, BAD[case.name] = BAD[case.name], nil
    end
  end
  assert(not next(BAD), next(BAD))
end
