-- Numbers figures, tables and equations, and resolves references to them and to sections: @fig:x,
-- @tbl:x, @eq:x, @sec:x.  Must run before --citeproc.  An unknown label stops pandoc, unless the
-- environment variable BITBYTE_XREF names a file: then everything found is written there, one per
-- line, and the faulty place is marked in the text.
local WORDS = { fig = "Figure", tbl = "Table", eq = "Equation", sec = "Section" }
local report_path = os.getenv("BITBYTE_XREF")
local found = {}
local labels = {}
local counts = { fig = 0, tbl = 0, eq = 0 }
local sections = {}
local LONG = 30 -- rows of a table that may break across pages

local function note(kind, text)
  found[#found + 1] = kind .. "\t" .. text
end

local function define(id, number)
  if id == "" then return end
  if labels[id] then note("twice", id) end
  labels[id] = number
  local kind = id:match("^(%l+):")
  if WORDS[kind] then note("label", id) end
end

local function mark(text)
  return pandoc.Span({ pandoc.Str("[?? " .. text .. "]") }, pandoc.Attr("", { "draft" }))
end

-- "Table 1." in front of a caption: the same words in every format.
local function put_number(caption, word, number)
  local first = caption.long[1]
  local label = pandoc.Strong({ pandoc.Str(word .. "\u{a0}" .. number .. ".") })
  first.content = pandoc.Inlines({ label, pandoc.Space() }) .. first.content
end

local function numbered(kind, word)
  return function(el)
    if #el.caption.long == 0 then return nil end
    counts[kind] = counts[kind] + 1
    define(el.identifier, tostring(counts[kind]))
    put_number(el.caption, word, counts[kind])
    return el
  end
end

local figure, table_ = numbered("fig", "Figure"), numbered("tbl", "Table")

local function header(el)
  if el.classes:includes("unnumbered") then return nil end
  sections[el.level] = (sections[el.level] or 0) + 1
  for level = el.level + 1, 6 do sections[level] = 0 end
  local parts = {}
  for level = 1, el.level do parts[level] = tostring(sections[level] or 0) end
  define(el.identifier, table.concat(parts, "."))
end

-- $$ ... $$ {#eq:x}
local function equation(math, id)
  counts.eq = counts.eq + 1
  local number = tostring(counts.eq)
  define(id, number)
  if FORMAT:match("typst") then
    local text = pandoc.write(pandoc.Pandoc({ pandoc.Para({ math }) }), "typst"):gsub("%s+$", "")
    return pandoc.RawInline("typst",
      "#math.equation(block: true, numbering: _ => [(" .. number .. ")], " .. text .. ".body) <" .. id .. ">")
  elseif FORMAT:match("latex") then
    return pandoc.RawInline("latex",
      "\\begin{equation}\\tag{" .. number .. "}\\label{" .. id .. "}" .. math.text .. "\\end{equation}")
  end
  local number_span = pandoc.Span({ pandoc.Str("(" .. number .. ")") }, pandoc.Attr("", { "number" }))
  return pandoc.Span({ math, number_span }, pandoc.Attr(id, { "equation" }))
end

local function inlines(list)
  local out = pandoc.Inlines({})
  local i = 1
  while i <= #list do
    local el = list[i]
    local at = i + 1
    if el.t == "Math" and el.mathtype == "DisplayMath" then
      while list[at] and (list[at].t == "Space" or list[at].t == "SoftBreak") do at = at + 1 end
      local id, rest
      if list[at] and list[at].t == "Str" then
        id, rest = list[at].text:match("^{#(eq:[%w_.-]+)}(.*)$")
      end
      if id then
        out:insert(equation(el, id))
        if rest ~= "" then out:insert(pandoc.Str(rest)) end
        i = at
      else
        out:insert(el)
      end
    else
      out:insert(el)
    end
    i = i + 1
  end
  return out
end

local function reference(id)
  local kind = id:match("^(%l+):")
  note("ref", id)
  if not labels[id] then
    note("unknown", id)
    if not report_path then error("no label " .. id) end
    return mark("no label " .. id)
  end
  return pandoc.Link({ pandoc.Str(WORDS[kind] .. "\u{a0}" .. labels[id]) }, "#" .. id)
end

local function cite(el)
  local ours, theirs = 0, 0
  for _, citation in ipairs(el.citations) do
    if WORDS[citation.id:match("^(%l+):") or ""] then
      ours = ours + 1
    else
      theirs = theirs + 1
      note("cite", citation.id)
    end
  end
  if ours == 0 then return nil end
  if theirs > 0 then
    note("mixed", el.citations[1].id)
    return mark("labels and citations in one bracket")
  end
  local out = pandoc.Inlines({})
  for i, citation in ipairs(el.citations) do
    if i > 1 then out:insert(pandoc.Str(i == #el.citations and " and " or ", ")) end
    out:extend(citation.prefix)
    if #citation.prefix > 0 then out:insert(pandoc.Space()) end
    out:insert(reference(citation.id))
    out:extend(citation.suffix)
  end
  return out
end

-- Spans that pandoc's writers do not know.
local function span(el)
  local class = el.classes[1]
  if class ~= "draft" then return nil end
  local before, after
  if FORMAT:match("typst") then
    before, after = "#" .. class .. "[", "]"
  elseif FORMAT:match("latex") then
    before, after = "\\textcolor{red}{\\bfseries ", "}"
  else
    return nil
  end
  local raw = FORMAT:match("typst") and "typst" or "latex"
  local out = pandoc.Inlines({ pandoc.RawInline(raw, before) })
  out:extend(el.content)
  out:insert(pandoc.RawInline(raw, after))
  return out
end

-- Columns get their natural widths, however long the source lines are; LaTeX cannot wrap text in
-- such columns, so there only tables of records get them.
local function natural(el)
  for i, spec in ipairs(el.colspecs) do el.colspecs[i] = { spec[1], nil } end
  return el
end

local function div(el)
  if not el.classes:includes("records-table") then return nil end
  return el:walk({ Table = natural }).content
end

local function widths(el)
  if not FORMAT:match("latex") then return natural(el) end
end

-- Typst: a short table stays on one page.  HTML: a wide table scrolls, its caption does not.
local function wrapped(el)
  if FORMAT:match("typst") then
    local rows = 0
    for _, body in ipairs(el.bodies) do rows = rows + #body.body end
    if rows <= LONG then return nil end
    return { pandoc.RawBlock("typst", "#[#show figure: set block(breakable: true)"), el,
      pandoc.RawBlock("typst", "]") }, false
  elseif FORMAT:match("html") then
    local caption, id = el.caption, el.identifier
    el.caption, el.identifier = pandoc.Caption(), ""
    local inside = pandoc.Div({ el }, pandoc.Attr("", { "scroll" }))
    if #caption.long == 0 then return inside, false end
    return pandoc.Figure({ inside }, caption, pandoc.Attr(id, { "table" })), false
  end
end

local function image(el)
  if not el.src:match("^figures/[%w_.-]+$") then
    note("image", el.src)
    if report_path then return mark("image " .. el.src) end
  end
end

local function raw(el)
  if el.format:match("html") and el.text:match("[sS][rR][cC]%s*=") then note("image", el.text) end
end

function Pandoc(doc)
  doc = doc:walk({ Div = div, Table = widths, Image = image, RawInline = raw, RawBlock = raw })
  doc = doc:walk({
    traverse = "topdown", Figure = figure, Table = table_, Header = header, Inlines = inlines,
  })
  doc = doc:walk({ Cite = cite })
  doc = doc:walk({ Span = span })
  doc = doc:walk({ traverse = "topdown", Table = wrapped })
  if report_path then
    local file = assert(io.open(report_path, "w"))
    file:write(table.concat(found, "\n"), "\n")
    file:close()
  end
  return doc
end
