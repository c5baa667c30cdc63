std = "luajit"
max_line_length = 110
cache = false
files["tests"] = { std = "luajit+busted" }
