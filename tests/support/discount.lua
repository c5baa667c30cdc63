--- discount.lua: Markdown for LDoc, as much of it as this repository writes.
--
-- LDoc asks for a module of this name and shows pages as they are typed where there is none: headings with
-- their signs, tables as bars, code in one paragraph. Debian's own (lua-discount) is one more package for
-- a page and a header, and its dialect has no fences of its own. Here: headings, paragraphs, lists,
-- tables, indented code, `code`, **bold**, links and images. By then LDoc has made <pre> of fenced code
-- and <code>, or a link, of what is between backticks, and has put an anchor before each heading. A text
-- without the mark of a page is a comment of the source: it keeps its lines, and only what is `code` and a
-- sign that HTML would swallow, as in runs/<name>, is changed.

local MARK = "<!-- page -->"
local TAGS = {} -- what LDoc writes into a text
for tag in ("a pre span code p em strong"):gmatch "%a+" do TAGS[tag] = true end

local function escape(text) return (text:gsub("&", "&amp;"):gsub("<", "&lt;"):gsub(">", "&gt;")) end

-- a sign that begins no tag
local function shield(text)
  return (text:gsub("<(/?)(%w*)", function(slash, tag)
    if not TAGS[tag] then return "&lt;" .. slash .. tag end
  end))
end

local function inline(text)
  local codes = {}
  text = text:gsub("`([^`]+)`", function(code)
    codes[#codes + 1] = "<code>" .. escape(code) .. "</code>"
    return ("\1%d\1"):format(#codes)
  end)
  text = shield(text)
  text = text:gsub("!%[([^%]]*)%]%(([^)]+)%)", '<img src="%2" alt="%1"/>')
  text = text:gsub("%[([^%]]+)%]%(([^)]+)%)", '<a href="%2">%1</a>')
  text = text:gsub("%*%*(.-)%*%*", "<strong>%1</strong>")
  return (text:gsub("\1(%d+)\1", function(i) return codes[tonumber(i)] end))
end

-- a comment of the source: outside of the code that LDoc has set
local function comment(text)
  local out, at = {}, 1
  while true do
    local from, to = text:find("<pre.->.-</pre>", at)
    local plain = text:sub(at, (from or 0) - 1)
    plain = plain:gsub("`([^`\n]+)`", function(code) return "<code>" .. escape(code) .. "</code>" end)
    out[#out + 1] = shield(plain):gsub("\n%s*\n", "\n<p>\n")
    if not from then return table.concat(out) end
    out[#out + 1] = text:sub(from, to)
    at = to + 1
  end
end

local function cells(line)
  local row, codes = {}, {}
  line = line:gsub("`([^`]+)`", function(code) -- a bar within code is no border
    codes[#codes + 1] = "`" .. code .. "`"
    return ("\2%d\2"):format(#codes)
  end)
  for cell in line:gsub("^%s*|", ""):gmatch "([^|]*)|" do
    row[#row + 1] = inline((cell:gsub("\2(%d+)\2", function(i) return codes[tonumber(i)] end)
      :match "^%s*(.-)%s*$"))
  end
  return row
end

local function row_of(line, tag)
  local open, close = "<" .. tag .. ">", "</" .. tag .. ">"
  return "<tr>" .. open .. table.concat(cells(line), close .. open) .. close .. "</tr>"
end

local function page(text)
  local lines, out, i = {}, {}, 1
  for line in (text .. "\n"):gmatch "(.-)\n" do lines[#lines + 1] = line end
  local function take(pattern, convert) -- lines that go on as the first began
    while lines[i] and lines[i]:find(pattern) do
      out[#out + 1] = convert(lines[i])
      i = i + 1
    end
  end
  while i <= #lines do
    local line = lines[i]
    local level, title = line:match "^(#+)%s+(.*)$"
    if level then
      out[#out + 1] = ("<h%d>%s</h%d>"):format(#level, inline(title), #level)
      i = i + 1
    elseif line:find "^<pre" then
      while lines[i] and not lines[i]:find "</pre>" do
        out[#out + 1] = lines[i]
        i = i + 1
      end
      out[#out + 1] = lines[i]
      i = i + 1
    elseif line:find "^    " then
      local code, margin = {}, math.huge
      while lines[i] and (lines[i]:find "^    " or not lines[i]:find "%S") do
        code[#code + 1] = escape(lines[i])
        if lines[i]:find "%S" then margin = math.min(margin, #lines[i]:match "^ *") end
        i = i + 1
      end
      for k, one in ipairs(code) do code[k] = one:sub(margin + 1) end
      out[#out + 1] = "<pre>" .. table.concat(code, "\n"):gsub("%s+$", "") .. "\n</pre>"
    elseif line:find "^|" and (lines[i + 1] or ""):find "^|[%-|: ]+$" then
      out[#out + 1] = "<table>\n" .. row_of(line, "th")
      i = i + 2
      take("^|", function(row) return row_of(row, "td") end)
      out[#out + 1] = "</table>"
    elseif line:find "^[-*] " then
      out[#out + 1] = "<ul>"
      take("^[-*] ", function(item)
        while (lines[i + 1] or ""):find "^  %S" do
          i = i + 1
          item = item .. "\n" .. lines[i]:sub(3)
        end
        return "<li>" .. inline(item:sub(3)) .. "</li>"
      end)
      out[#out + 1] = "</ul>"
    elseif line:find "^<a name" or not line:find "%S" then
      out[#out + 1] = line
      i = i + 1
    else
      local words = {}
      repeat
        words[#words + 1] = lines[i]
        i = i + 1
      until not (lines[i] or ""):find "%S" or lines[i]:find "^#+ " or lines[i]:find "^|"
        or lines[i]:find "^<pre" or lines[i]:find "^<a name"
      out[#out + 1] = "<p>" .. inline(table.concat(words, "\n")) .. "</p>"
    end
  end
  return table.concat(out, "\n")
end

return function(text)
  local from, to = text:find(MARK, 1, true)
  if not from then return comment(text) end
  return page(text:sub(1, from - 1) .. text:sub(to + 1))
end
