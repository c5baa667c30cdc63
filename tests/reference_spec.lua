--- reference_spec.lua: the Markdown of the reference's pages (tests/support/discount.lua).
--
-- make docs makes the reference and fails on a link that leads nowhere; what it cannot see is how a page
-- looks. Here each construction that the README uses becomes the HTML that it should.

local convert = dofile "tests/support/discount.lua"

local function page(text) return (convert(text .. "\n<!-- page -->"):gsub("%s+$", "")) end

describe("the reference's Markdown", function()
  it("sets headings, paragraphs and what is within them", function()
    assert.equal("<h2>How to <code>add</code></h2>", page "## How to `add`")
    assert.equal("<p>one\n<strong>two</strong> <code>a &lt; b ** c</code></p>\n\n<p>three</p>",
      page "one\n**two** `a < b ** c`\n\nthree")
    assert.equal('<p>see <a href="x.html">here</a>\n<code>code</code> begins a line</p>',
      page "see [here](x.html)\n<code>code</code> begins a line")
    assert.equal('<p><img src="a/b.png" alt="a plot"/></p>', page "![a plot](a/b.png)")
    assert.equal("<p>[B, N, H, D] and x * y, a &lt; b, runs/&lt;name></p>",
      page "[B, N, H, D] and x * y, a < b, runs/<name>")
  end)

  it("sets tables, lists and code", function()
    assert.equal("<p>before:</p>\n<table>\n<tr><th>a</th><th>b</th></tr>\n"
      .. "<tr><td>1</td><td><code>x|y</code></td></tr>\n</table>",
      page "before:\n| a | b |\n|---|---|\n| 1 | `x|y` |")
    assert.equal("<ul>\n<li>one\ngoes on</li>\n<li>two</li>\n</ul>", page "- one\n  goes on\n- two")
    assert.equal("<pre>if (a &lt; b)\n\n  c();\n</pre>", page "    if (a < b)\n\n      c();\n")
    assert.equal('<a name="x"></a>\n<h2>X</h2>\n<pre>\n# no heading\n</pre>',
      page '<a name="x"></a>\n## X\n<pre>\n# no heading\n</pre>')
  end)

  it("leaves a comment of the source as it is, but for code and signs", function()
    assert.equal("runs/&lt;name> # and * and | stay\n<p>\n  <code>x &lt; y</code> -> z",
      convert "runs/<name> # and * and | stay\n\n  `x < y` -> z")
    assert.equal('<a href="#f">f</a> <pre class="x">a < b `c`</pre> &lt; d',
      convert '<a href="#f">f</a> <pre class="x">a < b `c`</pre> < d')
  end)

  it("has a construction for every line of the README", function()
    local file = assert(io.open("README.md", "rb"))
    local text = file:read "*a":gsub("\n```(%w*)\n(.-)\n```\n", "\n<pre>\n</pre>\n") -- LDoc sets these
    file:close()
    local html = page(text)
    for _, sign in ipairs { "\n#", "\n|", "\n%- ", "%*%*", "`", "%]%(" } do
      assert.is_nil(html:find(sign), html:match("[^\n]*" .. sign .. "[^\n]*"))
    end
  end)
end)
