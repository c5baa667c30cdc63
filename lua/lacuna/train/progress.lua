--- train/progress.lua: what a run prints while it trains.
--
-- A bar on a terminal and plain lines elsewhere, so that logs of batch jobs are readable; at most ten bars
-- and one line a second. The functions work on the state table of train.fit (step, first, last, smooth, lr,
-- tokens, started, deadline, style, out) and change nothing in it but what they need to remember themselves.

local sys = require "lacuna.sys"

local BAR = 14 -- the whole line stays under 80 columns

local function clock_text(seconds)
  seconds = math.max(0, math.floor(seconds + 0.5))
  if seconds >= 3600 then return ("%d:%02d:%02d"):format(seconds / 3600, seconds / 60 % 60, seconds % 60) end
  return ("%d:%02d"):format(seconds / 60, seconds % 60)
end

local function rate_text(rate)
  if rate >= 1e6 then return ("%.2fM"):format(rate / 1e6) end
  if rate >= 1e4 then return ("%.1fk"):format(rate / 1e3) end
  return ("%.0f"):format(rate)
end

local function progress_line(s)
  local elapsed = sys.time() - s.started
  local done = math.max(1, s.step - s.first + 1)
  local left = (s.last - s.step) * elapsed / done
  if s.deadline then left = math.min(left, s.deadline - sys.time()) end
  return ("step %d/%d  loss %.4f  lr %.1e  %s tok/s  left %s"):format(s.step, s.last, s.smooth, s.lr,
    rate_text(s.tokens / elapsed), clock_text(left))
end

local function show_bar(s)
  local filled = math.floor(BAR * s.step / s.last + 0.5)
  s.out:write("\r[", ("="):rep(filled), (" "):rep(BAR - filled), "] ", progress_line(s), "\27[K")
  s.out:flush()
  s.bar_shown = true
end

local function clear_bar(s)
  if s.bar_shown then s.out:write("\r\27[K") end
  s.bar_shown = false
end

local function say(s, text)
  if s.style == "none" then return end
  clear_bar(s)
  s.out:write(text, "\n")
  s.out:flush()
end

local function report(s)
  local now = sys.time()
  if s.style == "bar" then
    if now - s.last_shown < 0.1 and s.step < s.last then return end
    show_bar(s)
  elseif s.style == "lines" then
    if s.step % s.log_every ~= 0 and s.step < s.last then return end
    if now - s.last_shown < 1 and s.step < s.last and s.step > s.first then return end
    say(s, progress_line(s))
  end
  s.last_shown = now
end

--- How the option progress = "auto" | "bar" | "lines" | "none" is meant on this output. A terminal that calls
-- itself dumb would show the bar's control characters.
local function style(wanted, out)
  if wanted ~= "auto" then return wanted end
  return sys.isatty(out) and os.getenv("TERM") ~= "dumb" and "bar" or "lines"
end

return { say = say, report = report, clear = clear_bar, style = style }
