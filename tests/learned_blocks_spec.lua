--- experiments/learned_blocks.lua, as a user runs it: patterns that learn beat random ones of their density.

local sys = require "lacuna.sys"

local COMMAND = [[LUA_PATH="lua/?.lua;lua/?/init.lua;$LUA_PATH;;" luajit experiments/learned_blocks.lua ]]

describe("learned patterns of blocks", function()
  it("beat a random pattern of the same density on a task of their own", function()
    local status, text, err = sys.run(COMMAND .. "--seed 3")
    assert.equal(0, status, err)
    assert.matches("^density 0.250, 300 steps\n", text)
    for _, task in ipairs { "fixed +learned", "by content +adaptive" } do
      local found, missed = text:match(task .. " +([%d.]+) +random +([%d.]+)")
      assert.is_true(tonumber(found) < 0.5 * tonumber(missed), text)
    end
  end)

  it("take --quick, as every experiment does", function()
    local status, text, err = sys.run(COMMAND .. "--quick --steps 3")
    assert.equal(0, status, err)
    assert.matches("^density 0.500, 3 steps\nfixed .*\nby content ", text)
  end)
end)
