--- What other libraries call things: hints for errors about unknown names.
--
-- A name that is near in spelling is found by schema.hint. One that is near only in meaning is listed here,
-- with what to write instead, because people arrive with the names of PyTorch and NumPy in their fingers.
-- These are words of an error, never aliases: two names for one thing would both have to be documented and
-- kept.

return {
  -- x.name and x:name()
  tensor = {
    shape = "x:size()", ndim = "x:dim()", nelement = "x:numel()", nElement = "x:numel()", type = "x:dtype()",
    numpy = "x:totable()", tolist = "x:totable()", type_as = "x:to{ dtype = y:dtype() }",
    cuda = 'x:to{ device = "cuda" }', cpu = 'x:to{ device = "cpu" }',
    T = "x:t()", mT = "x:transpose(-1, -2)", swapaxes = "x:transpose(i, j)", swapdims = "x:transpose(i, j)",
    movedim = "x:permute(...)", moveaxis = "x:permute(...)", ravel = "x:flatten()", unflatten = "x:view(...)",
    ["repeat"] = "x:tile(...)", broadcast_to = "x:expand(...)", unbind = "x:split(1, dim), or x[i]",
    mm = "x:matmul(y)", mv = "x:matmul(v)", ger = "x:outer(y)", inner = "x:dot(y)",
    amax = "x:max(dim)", amin = "x:min(dim)", fmax = "x:maximum(y)", fmin = "x:minimum(y)",
    clip = "x:clamp(low, high)", absolute = "x:abs()", nansum = "x:nan_to_num():sum()",
    softmin = "(-x):softmax(dim)",
    normalize = "x / x:norm(2, dim, true)", argwhere = "x:nonzero()", index_put = "x[index] = value",
    reciprocal = "x:recip()", entropy = "-x:xlogy(x):sum(dim)", aminmax = "x:min(dim) and x:max(dim)",
    var_mean = "x:var(dim) and x:mean(dim)", std_mean = "x:std(dim) and x:mean(dim)",
    nanmean = "x:nan_to_num():sum() / x:isnan():logical_not():sum()", dist = "(x - y):norm()",
    pairwise_distance = "(x - y):norm(2, -1)", digitize = "x:bucketize(boundaries)",
    histogram = "x:histc(bins, low, high)",
    new_zeros = "lac.zeros{ ..., dtype = x:dtype() }",
    new_tensor = "lac.tensor(values, { dtype = x:dtype() })",
  },
  -- lac.name
  lac = {
    scaled_dot_product_attention = "lac.attend(q, k, v, { segments = { n }, dilations = { 1 } })",
    tril_indices = "lac.ones{ n, m }:tril():nonzero():t()",
    triu_indices = "lac.ones{ n, m }:triu():nonzero():t()",
    concat = "lac.cat(list, dim)", concatenate = "lac.cat(list, dim)", hstack = "lac.cat(list, 2)",
    vstack = "lac.cat(list, 1)", column_stack = "lac.stack(list, 2)",
    load = "lac.io.load(path)", save = "lac.io.save(path, tensors)",
    from_numpy = "lac.io.load(path) of a .safetensors file", logspace = "10 ^ lac.linspace(low, high, n)",
    set_grad_enabled = "lac.no_grad(fn) and lac.enable_grad(fn)", inference_mode = "lac.no_grad(fn)",
    autograd = "lac.grad, lac.custom_op, lac.no_grad", compile = "lac.graph(fn), on cuda",
    functional = "lac itself: lac.relu(x), lac.softmax(x, dim)",
    set_default_dtype = "lac.default_dtype(name)", set_default_device = "lac.default_device(name)",
    set_num_threads = "lac.threads(n)", set_printoptions = "the options of the module lacuna.pretty",
  },
  -- lac.nn.name
  nn = {
    MultiheadAttention = 'nn.MultiheadDilatedAttention{ variant = "dense" }',
    TransformerEncoder = "nn.LongNetEncoder", TransformerEncoderLayer = "nn.Block",
    TransformerDecoder = "nn.LongNetLM", Transformer = "nn.LongNetEncoderDecoder",
    Parameter = "self:param(name, tensor) in init of an nn.module",
    ModuleDict = "fields of an nn.module: self.name = module", functional = "lac.relu(x) and the like",
    init = "layer.weight:copy_(values) in lac.no_grad", utils = "optimizer:step{ clip = largest norm }",
  },
  dtype = {
    float32 = "f32", float = "f32", fp32 = "f32", float64 = "f64", double = "f64", fp64 = "f64",
    float16 = "f16", half = "f16", fp16 = "f16", bfloat16 = "bf16", int64 = "i64", long = "i64",
    int32 = "i32", int = "i32", uint8 = "u8", byte = "u8", boolean = "bool",
  },
}
