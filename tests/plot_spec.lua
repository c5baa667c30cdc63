--- plot_spec.lua: figures are made, are what their name says, and cannot be turned into commands by a label.
--
-- The PNG's size is read from its header; an SVG is searched for its labels. Hostile labels contain quotes,
-- backticks and gnuplot's own syntax and must come out as text. A missing gnuplot is played by an empty PATH
-- in a child process.

local lac = require "lacuna"
local sys = require "lacuna.sys"
local plot = lac.plot

local read = require "support.read"

describe("plot", function()
  local png, svg = sys.temporary(".png"), sys.temporary(".svg")
  after_each(function()
    os.remove(png)
    os.remove(svg)
  end)

  it("draws lines, scatter and heat maps as PNG and SVG", function()
    assert.equal(png, plot.lines{ title = "loss", xlabel = "step", ylabel = "bits", series = {
      { label = "a", x = { 1, 2, 3 }, y = { 3, 2, 1.5 } }, { label = "b", y = { 2, 1, 0 / 0 },
        style = "linespoints" } },
      logx = true, output = png, size = { 400, 300 } })
    local text = read(png)
    assert.equal("\137PNG\r\n\26\n", text:sub(1, 8))
    assert.same({ 0, 0, 1, 144, 0, 0, 1, 44 }, { text:byte(17, 24) }) -- 400 x 300
    plot.scatter{ x = lac.arange{ 5 }, y = lac.arange{ 5 }, title = "dots", output = svg, legend = "none" }
    assert.is_truthy(read(svg):find("dots", 1, true))
    plot.heatmap{ z = { { 1, 2 }, { 3, 4 } }, xticks = { "left_1", "right" }, yticks = { "top", "low" },
      zlabel = "bits",
      output = svg }
    assert.is_truthy(read(svg):find("left_1", 1, true))
    plot.heatmap{ z = lac.eye{ 3 }, output = png }
    assert.equal("\137PNG", read(png):sub(1, 4))
  end)

  it("draws on the terminal", function()
    local text = plot.lines{ title = "a title", y = { 1, 4, 9 }, size = { 60, 15 } }
    assert.is_truthy(text:find("a title", 1, true))
    assert.is_truthy(text:find("*", 1, true))
    assert.equal("0 3\n6 9\n0 = 1, 9 = 4\n", plot.heatmap{ z = { { 1, 2 }, { 3, 4 } } })
  end)

  it("takes labels as text, whatever they contain", function()
    local canary = sys.temporary(".canary")
    local nasty = "it's `touch " .. canary .. "` $(x) \"q\" \\n_{a}^b @x\nset print"
    plot.lines{ title = nasty, xlabel = nasty, output = svg,
      series = { { label = nasty, y = { 1, 2 }, labels = { nasty, nasty } } } }
    local text = read(svg)
    assert.is_truthy(text:find("it's `touch", 1, true) or text:find("it&#39;s `touch", 1, true)
      or text:find("it&apos;s `touch", 1, true), text)
    assert.is_truthy(text:find("_{a}^b", 1, true))
    assert.is_false(sys.exists(canary))
  end)

  it("names what is wrong", function()
    assert.error_matches(function() plot.lines{ y = { 1 }, output = "x.jpg" } end,
      "must end in %.png or %.svg")
    assert.error_matches(function() plot.lines{ y = { 1, "2" } } end, "y%[2%] must be a number")
    assert.error_matches(function() plot.lines{ y = { 1, 2 }, x = { 1 } } end, "1 x values and 2 y values")
    assert.error_matches(function() plot.lines{ y = { 1 }, titel = "x" } end, "did you mean 'title'")
    assert.error_matches(function() plot.lines{ series = {} } end, "series is empty")
    assert.error_matches(function() plot.lines{ series = { { y = {} } } } end, "series%[1%] is empty")
    assert.error_matches(function() plot.lines{ y = { 1 }, style = "bars" } end, "lines")
    assert.error_matches(function() plot.heatmap{ z = lac.zeros{ 2, 3, 3 } } end,
      "z must be a list of rows of numbers, or a 2%-D tensor, got Tensor f32 %[2 x 3 x 3%] cpu")
    assert.error_matches(function() plot.heatmap{ z = { { 1, 2 }, { 3 } } } end,
      "row 2 has 1 columns, row 1 has 2")
    assert.error_matches(function() plot.lines{ y = { 1, 2 }, output = "/nonexistent/x.png" } end,
      "gnuplot says.*/nonexistent/x.png")
    assert.error_matches(function() plot.lines{ y = { 1, 2 }, x = { 0, 0 }, logx = true, output = png } end,
      "gnuplot says")
  end)

  it("names the package when gnuplot is missing", function()
    local status, out = sys.run([[LUA_PATH="lua/?.lua;lua/?/init.lua;$LUA_PATH;;" PATH=/nonexistent ]]
      .. sys.quote(arg and arg[-1] and arg[-1]:find("/") and arg[-1] or "/usr/bin/luajit")
      .. [[ -e 'print(select(2, pcall(require("lacuna").plot.lines, { y = { 1 } })))']])
    assert.equal(0, status)
    assert.matches("gnuplot is not installed.*apt%-get install gnuplot%-nox", out)
  end)
end)
