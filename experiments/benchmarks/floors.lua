--- floors.lua: what the machine gives: copy bandwidth and matrix products, beside PyTorch's.
--
-- The other sections state rows as a ratio to these two: memory-bound operators to a copy of arrays far
-- beyond the caches (bytes read plus bytes written; the store's own read of the line is not counted, on
-- either side), compute-bound ones to a product of 1024 x 1024 matrices in OpenBLAS on the same threads. They
-- are measured again, in turns, next to every row that uses them; this section shows them, and judges them:
-- a slow floor would flatter everything that is measured against it.

return {
  name = "floors",
  about = "copy bandwidth and matrix products on this machine",
  run = function(b)
    local copy, bytes = b:floor("copy")
    b:row{ what = ("copy of %.3g MiB"):format(bytes / 2 ^ 21), ours = copy, work = bytes, unit = "B/s",
      peer = { script = "basics", case = "copy", arguments = { elements = bytes / 8 } }, at_least = 0.95 }
    local sgemm, flops = b:floor("sgemm")
    local n = math.floor((flops / 2) ^ (1 / 3) + 0.5)
    b:row{ what = ("product %d x %d x %d, f32"):format(n, n, n), ours = sgemm, work = flops, unit = "FLOP/s",
      peer = { script = "basics", case = "matmul", arguments = { n = n } }, at_least = 0.9 }
    b:row{ what = "sgemm against itself (the method's noise)", ours = sgemm, work = flops, floor = "sgemm" }
  end,
}
