-- first_steps.lua: a walk through Lacuna in cells, to read and to run.
--
-- Each cell starts with `-- %%`, the mark that editors with a "run cell" command understand. Run the whole walk with
-- `lacuna notebooks/first_steps.lua`, or `lacuna -i notebooks/first_steps.lua` to go on in the REPL with everything
-- that it made (cells use globals for that reason). A spec runs it, so it cannot go stale.

-- %% Tensors: sizes and options share one table; dimensions count from 1
lac = require "lacuna"
lac.manual_seed(1)
x = lac.randn{ 3, 4 }
print(x)
print(x[1], x[{ {}, { 1, 2 } }])
print(x:transpose(1, 2):matmul(x))

-- %% Gradients: mark a tensor, compute, call backward
w = lac.randn{ 4, 2, grad = true }
loss = x:matmul(w):tanh():sum()
loss:backward()
print(w.grad)

-- %% Dilated attention: [B, N, H, D] tensors and a list of segments and dilations
q, k, v = lac.randn{ 1, 64, 4, 8 }, lac.randn{ 1, 64, 4, 8 }, lac.randn{ 1, 64, 4, 8 }
out, lse = lac.attend(q, k, v, { segments = { 16, 32, 64 }, dilations = { 1, 2, 4 }, heads = "all", merge = "lse",
                                 causal = true })
print(out:size(), lse:size())

-- %% The same as a module, which can explain itself
attn = lac.attention{ variant = "longnet", segments = { 16, 32, 64 }, dilations = { 1, 2, 4 }, heads = 4,
                      causal = true }
print(attn:explain(64))
print("functional and module form differ by", (attn(q, k, v) - out):abs():max():item())

-- %% Which keys does a row see? With q = 0 and V = identity every output row is uniform over exactly those keys.
zero = lac.zeros{ 1, 64, 4, 64 }
identity = lac.eye(64):view(1, 64, 1, 64):expand(1, 64, 4, 64)
seen = attn(zero, zero, identity)
last = seen[{ 1, 64, 1, {} }]
print("row 64 of head 1 sees keys:")
for key = 1, 64 do
  if last[key]:item() > 0 then io.write(key, " ") end
end
print()

-- %% A misspelt option is an error that names the nearest valid one
print(select(2, pcall(lac.attend, q, k, v, { segments = { 16 }, dilation = { 1 } })))
