--- Random choices of the specs of attention, from seeds that a failure prints.
--
-- A generator has its own state (the linear congruence of ANSI C's example, its high bits), so that a seed
-- names a list of configurations whatever else draws numbers. What is random is a matter of the specs; how a
-- configuration reads in a message is the same for all of them.

local random = {}

--- The state after x, both in 0 .. 2^31 - 1; all states are one cycle.
function random.step(x)
  -- 1103515245 is 16838 * 2^16 + 20077: the whole product has more bits than a double
  return (x * 16838 % 32768 * 65536 + x * 20077 + 12345) % 2147483648
end

--- A generator: seed(x), random(n) -> 1 .. n, pick(list), chance(p).
function random.generator()
  local state, g = 1, {}
  function g.seed(x) state = x end
  function g.random(n)
    state = random.step(state)
    return math.floor(state / 65536) % n + 1
  end
  function g.pick(list) return list[g.random(#list)] end
  function g.chance(p) return g.random(1000) <= p * 1000 end
  return g
end

--- The seed of a run: LACUNA_SEED repeats one.
function random.fresh() return tonumber(os.getenv "LACUNA_SEED") or os.time() % 1000000 end

--- A configuration in words; of a tensor {shape =, layout =} its shape.
function random.text(c)
  local list = {}
  for key, value in pairs(c) do
    if type(value) == "table" and value.shape then
      value = ("[%s]%s"):format(table.concat(value.shape, ","), value.layout or "")
    elseif type(value) == "table" then
      local items = {}
      for i, x in ipairs(value) do items[i] = tostring(x) end
      value = "{" .. table.concat(items, ",") .. "}"
    end
    list[#list + 1] = key .. "=" .. tostring(value)
  end
  table.sort(list)
  return table.concat(list, " ")
end

return random
