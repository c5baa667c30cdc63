--- Every operator: its function, its method, its gradient rule, in one record.
--
-- A package by kind of operator: base (records, the tape), map (elementwise), view (casts, views, slices),
-- inplace, reduce (and softmax), linear (products, norms), fused (several of these as one), index (and
-- joining, dropout), sort (and what follows from order), scan (running sums and extremes), scatter (and
-- counting), shape (padding, windows, diagonals), product (einsum and the named products), compare
-- (distances, differences), conv, loss,
-- position (rotary and linear biases, masks, draws by weight).
-- Each file defines its operators into the one table of base; this file only loads them, in the order in
-- which they need each other. tests/support/cases.lua must have a case for each name; a spec says so.
--
-- Hot path: a call of an elementwise operator or of matmul makes a struct, a tensor table and a tape record,
-- nothing else. No closures (FNEW ends a trace), no varargs, no pairs; tests/dispatch_spec.lua asserts that
-- LuaJIT compiles it. Views copy a struct and need no C call. Rejected: a general `apply(op, ...)` that packs
-- arguments, which costs a microsecond by itself.

local ops = require "lacuna.ops.base"
require "lacuna.ops.map"
require "lacuna.ops.reduce"
require "lacuna.ops.view"
require "lacuna.ops.inplace"
require "lacuna.ops.linear"
require "lacuna.ops.fused"
require "lacuna.ops.index"
require "lacuna.ops.sort"
require "lacuna.ops.scan"
require "lacuna.ops.scatter"
require "lacuna.ops.shape"
require "lacuna.ops.product"
require "lacuna.ops.compare"
require "lacuna.ops.distance"
require "lacuna.ops.conv"
require "lacuna.ops.loss"
require "lacuna.ops.position"

return ops
