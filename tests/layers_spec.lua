--- Layers point one way: a file may require or include only what is below it.
--
-- The order is written down here once. A file that is in no layer fails too, so that a new file has to be
-- given its place. The check reads the sources; lazy requires inside functions count like the others,
-- except in lacuna/init.lua, which is the top.
--
-- Why a test and not a habit: one upward require makes two modules one, and the cycle shows up months later
-- as a load order that only works from one entry point. The checks are functions of (name, text), so that
-- they are tested themselves.

local read = require "support.read"

local function files(command)
  local list = {}
  local p = io.popen(command)
  for line in p:lines() do list[#list + 1] = line end
  p:close()
  return list
end

-- one entry per layer; modules of one layer do not require each other, except inside a package (nn*, dist*)
local LUA = {
  "lib",
  "sys json arguments",
  "class",
  "schema synonyms formulas",
  "registry device scope config environment",
  "tensor sites",
  "pretty create",
  "ops*",
  "grad",
  "recompute watch graph",
  "gradcheck",
  "attention.masks attention.shard attention.coverage",
  "attention.alibi attention.packed attention.partial",
  "attention.variants attention.sparse attention.explain attention.decode",
  "attention.weights attention.pairs",
  "attention.ring attention.matrix attention.decode_blocks",
  "attention.module",
  "attention",
  "nn*",
  "optim*",
  "io",
  "data log csv plot",
  "memory profile",
  "timeline",
  "train*",
  "dist*",
  "sweep bench",
  "cli",
  "help",
  "repl notebook",
  "init",
}

local function rank_of(name)
  for rank, line in ipairs(LUA) do
    for entry in line:gmatch("%S+") do
      local package = entry:match("^(.*)%*$")
      if entry == name or (package and (name == package or name:sub(1, #package + 1) == package .. ".")) then
        return rank, package
      end
    end
  end
end

local function module_name(path)
  return (path:gsub("^lua/lacuna/", ""):gsub("%.lua$", ""):gsub("/init$", ""):gsub("/", "."))
end

-- names of the modules below lacuna. that a source requires; comments do not count
local function required(text)
  local names = {}
  for line in text:gmatch("[^\n]+") do
    local code = line:gsub("%-%-.*$", "")
    for name in code:gmatch("require%s*%(?%s*[\"']lacuna%.([%w_.]+)[\"']") do names[#names + 1] = name end
  end
  return names
end

-- complaints about one Lua file; separate from the file system so that the check itself can be tested
local function check_lua(name, text)
  local complaints = {}
  local rank, package = rank_of(name)
  if not rank then return { ("%s is in no layer of tests/layers_spec.lua"):format(name) } end
  for _, other in ipairs(required(text)) do
    local other_rank, other_package = rank_of(other)
    if not other_rank then
      complaints[#complaints + 1] = ("%s requires %s, which is in no layer"):format(name, other)
    elseif other_rank > rank or (other_rank == rank and not (package and package == other_package)) then
      complaints[#complaints + 1] = ("%s (layer %d) requires %s (layer %d)")
        :format(name, rank, other, other_rank)
    end
  end
  return complaints
end

-- C: a header's layer is its file's; entries may be included from any later line and from their own
local C_LAYERS = {
  "lacuna.h lacuna_queue.h status.h status.c rng.h lru.h", "core.h maps.def ops.def special.h",
  "backend.h device.h op_front.h", "plan.h op_attn.h comm.h ring.h", "cpu/*",
  "pool.c tensor.c copies.c graph.c abi.c backend.c crc.c", "op_*.c", "plan.c", "comm*.c",
  "profile.c watch.c", "ring*.c", "interrupt.h", "interrupt.c main.c",
}

local function c_rank(name)
  for rank, line in ipairs(C_LAYERS) do
    for entry in line:gmatch("%S+") do
      local pattern = "^" .. entry:gsub("[%.%-]", "%%%0"):gsub("%*", ".*") .. "$"
      if name:match(pattern) then return rank end
    end
  end
end

local function check_c(name, text)
  local complaints = {}
  local rank = c_rank(name)
  if not rank then return { ("c/%s is in no layer of tests/layers_spec.lua"):format(name) } end
  for other in text:gmatch('#%s*include%s*"([^"]+)"') do
    local clean = other:gsub("^%.%./", "")
    local other_rank = c_rank(clean) or c_rank("cpu/" .. clean)
    if not other_rank then
      complaints[#complaints + 1] = ("c/%s includes %s, which is in no layer"):format(name, other)
    elseif other_rank > rank then
      complaints[#complaints + 1] = ("c/%s includes %s from above"):format(name, other)
    end
  end
  return complaints
end

local function collect(list, check, prefix, name_of)
  local all = {}
  for _, path in ipairs(list) do
    for _, complaint in ipairs(check(name_of and name_of(path) or path:sub(#prefix + 1), read(path))) do
      all[#all + 1] = complaint
    end
  end
  return all
end

describe("layers", function()
  it("point one way in lua/", function()
    local list = files("find lua/lacuna -name '*.lua' | sort")
    assert.is_true(#list > 10)
    assert.are.same({}, collect(list, check_lua, "", module_name))
  end)

  it("point one way in c/", function()
    local list = files("find c -name '*.[ch]' -o -name '*.def' -o -name '*.inc' | sort")
    assert.is_true(#list > 10)
    assert.are.same({}, collect(list, check_c, "c/"))
  end)

  it("notice an upward require and an upward include", function() -- the checks can fail
    assert.are.same({ "ops (layer 8) requires grad (layer 9)" },
                    check_lua("ops", 'local g = require "lacuna.grad"'))
    assert.are.same({}, check_lua("grad", 'local o = require("lacuna.ops") -- require "lacuna.nn"'))
    assert.are.equal(1, #check_lua("nowhere", ""))
    assert.are.same({ "c/core.h includes backend.h from above" }, check_c("core.h", '#include "backend.h"\n'))
    assert.are.equal(1, #check_c("nowhere.c", ""))
  end)

  it("repeat numbers of the engine as they are", function() -- explain() tells what the engine will do
    local lua = read "lua/lacuna/attention/module.lua"
    local most = read("kernels/attn_parts_forward.cu"):match "return head_dim <= (%d+) &&"
    assert.are.equal(most, lua:match "local WIDEST = (%d+)")
    assert.are.equal(most, read("c/plan.h"):match "LAC_HOPPER_WIDE = (%d+)")
    local few = read("kernels/attn_few.cu"):match "FEW_ROWS = (%d+)"
    assert.are.equal(few, lua:match "local FEW = (%d+)")
    assert.is_true(#most > 0 and #few > 0)
  end)

  it("keep the engine's ffi in one file", function()
    -- sys.lua and repl/plot may use ffi for the C library; nobody but lib.lua may load the engine
    local users = {}
    for _, path in ipairs(files("find lua/lacuna -name '*.lua' | sort")) do
      local text = read(path)
      if text:find("ffi.load", 1, true) and text:find("liblacuna", 1, true) then users[#users + 1] = path end
    end
    assert.are.same({ "lua/lacuna/lib.lua" }, users)
  end)
end)

describe("the build of attention's kernels", function()
  local function judged(kernel, bytes, warning)
    local path = os.tmpname()
    local f = assert(io.open(path, "w"))
    f:write(([[
ptxas info    : Compiling entry function '%s' for 'sm_90a'
ptxas info    : Function properties for %s
    0 bytes stack frame, %d bytes spill stores, %d bytes spill loads
%s]]):format(kernel, kernel, bytes, bytes, warning or ""))
    f:close()
    local said = files("awk -f kernels/ptxas.awk " .. path .. "; echo $?")
    os.remove(path)
    return tonumber(said[#said]), said[1]
  end

  it("fails where registers spill or products wait for each other", function()
    assert.are.equal(0, (judged("_Z22hopper_forward_kernel1", 0)))
    local status, why = judged("_Z22hopper_forward_kernel1", 4)
    assert.are.equal(1, status)
    assert.are.equal("_Z22hopper_forward_kernel1 for sm_90a spills 4 bytes", why)
    local serial = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
      .. "serialized due to insufficient register resources for the wgmma pipeline in function 'k'\n"
    status, why = judged("_Z22hopper_forward_kernel1", 0, serial)
    assert.are.equal(1, status)
    assert.matches("C7510", why)
    for bytes, expected in pairs { [64] = 0, [68] = 1 } do -- one that may
      assert.are.equal(expected, (judged("_Z18hopper_redo_kernelI6__half", bytes)))
    end
  end)
end)
