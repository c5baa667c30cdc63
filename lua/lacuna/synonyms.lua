--- What other libraries call things: hints for errors about unknown names.
--
-- A name that is near in spelling is found by schema.hint. One that is near only in meaning is listed here,
-- with what to write instead, because people arrive with the names of PyTorch and NumPy in their fingers.
-- These are words of an error, never aliases: two names for one thing would both have to be documented and
-- kept. Text that begins with a semicolon says that there is no such thing. What is an expression runs as it
-- stands (tests/schema_spec.lua runs all): of tensors x, y and v, numbers, and so on.

local NO_FUNCTION = "; it is not among the elementwise functions here (lac.custom_op makes new ones)"
local NO_ALGEBRA = "; of linear algebra there are products only"

-- Methods of a tensor, and names below, with one result of x's shape: of their form in place, where there is
-- none, x:copy_(...) does the work (tests/schema_spec.lua runs all).
local in_place = {}
for name in ([[
  cumprod cumsum digamma dropout eq erfinv flip ge gelu_tanh gt hardshrink isfinite isinf isnan le
  lgamma log_softmax logaddexp logcumsumexp logsigmoid lt ne roll softmax softshrink softsign tril triu

  absolute arccos arccosh arcsin arcsinh arctan arctan2 arctanh clamp_max clamp_min clip deg2rad divide
  fix fliplr flipud float_power fmax fmin greater greater_equal heaviside isneginf isposinf ldexp less
  less_equal logaddexp2 multiply negative normalize not_equal prelu rad2deg reciprocal remainder rsub
  sgn signbit softmin subtract tanhshrink true_divide
]]):gmatch "%S+" do in_place[name] = true end

return {
  in_place = in_place,
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
    arccos = "x:acos()", arccosh = "x:acosh()", arcsin = "x:asin()", arcsinh = "x:asinh()",
    arctan = "x:atan()", arctanh = "x:atanh()", arctan2 = "x:atan2(y)", sgn = "x:sign()", fix = "x:trunc()",
    negative = "-x", subtract = "x - y", multiply = "x * y", divide = "x / y", true_divide = "x / y",
    remainder = "x:mod(y)", rsub = "y - x", float_power = "x:double() ^ y:double()", ldexp = "x * y:exp2()",
    greater = "x:gt(y)", greater_equal = "x:ge(y)", less = "x:lt(y)", less_equal = "x:le(y)",
    not_equal = "x:ne(y)", isposinf = "x:eq(math.huge)", isneginf = "x:eq(-math.huge)",
    signbit = "lac.ones_like(x):copysign(x):lt(0)",
    clamp_min = "x:clamp(low)", clamp_max = "x:clamp(nil, high)",
    heaviside = "lac.where(x:eq(0), y, x:gt(0):to{ dtype = x:dtype() })",
    logaddexp2 = "(x * math.log(2)):logaddexp(y * math.log(2)) / math.log(2)",
    deg2rad = "x * (math.pi / 180)", rad2deg = "x * (180 / math.pi)", tanhshrink = "x - x:tanh()",
    prelu = "lac.where(x:gt(0), x, v * x)",
    polygamma = NO_FUNCTION, mvlgamma = NO_FUNCTION, igamma = NO_FUNCTION, i0 = NO_FUNCTION,
    nextafter = NO_FUNCTION, gcd = NO_FUNCTION, lcm = NO_FUNCTION,
    reshape_as = "x:reshape(y:size())", view_as = "x:view(y:size())",
    split_with_sizes = "x:split(sizes, dim)",
    tensor_split = "x:split(sizes, dim)", hsplit = "x:split(sizes, 2)", vsplit = "x:split(sizes, 1)",
    fliplr = "x:flip(2)", flipud = "x:flip(1)", rot90 = "x:t():flip(1)", diagflat = "x:flatten():diag()",
    diag_embed = "x:unsqueeze(-1) * lac.eye{ n }", msort = "x:sort(1)", ndimension = "x:dim()",
    take = "x:flatten():index_select(1, idx)", vdot = "v:dot(v)", addr = "x + v:outer(v)",
    cov = "(x - x:mean(2, true)):matmul((x - x:mean(2, true)):t()) / (n - 1)",
    squeeze_ = "x = x:squeeze()", unsqueeze_ = "x = x:unsqueeze(dim)", transpose_ = "x = x:transpose(i, j)",
    t_ = "x = x:t()", detach_ = "x = x:detach()", resize_ = "x = x:view(...), or a new tensor",
    fill_diagonal_ = "x:diagonal():fill_(value)", index_put_ = "x[index] = value",
    exponential_ = "x:copy_(-(1 - lac.rand_like(x)):log())",
    random_ = "x:copy_(lac.randint{ ..., high = n })", pin_memory = "x:pin()", data_ptr = "x:data()",
    get_device = "x:device()", element_size = "bytes by x:dtype()", storage = "x:view(...) shares its memory",
    det = NO_ALGEBRA, inverse = NO_ALGEBRA, solve = NO_ALGEBRA, svd = NO_ALGEBRA, qr = NO_ALGEBRA,
    eig = NO_ALGEBRA, cholesky = NO_ALGEBRA, pinverse = NO_ALGEBRA, matrix_exp = NO_ALGEBRA,
    normalize = "x / x:norm(2, dim, true)", argwhere = "x:nonzero()", index_put = "x[index] = value",
    reciprocal = "x:recip()", entropy = "-x:xlogy(x):sum(dim)", aminmax = "x:min(dim) and x:max(dim)",
    var_mean = "x:var(dim) and x:mean(dim)", std_mean = "x:std(dim) and x:mean(dim)",
    nanmean = "x:nan_to_num():sum() / x:isnan():logical_not():sum():item()", dist = "(x - y):norm()",
    pairwise_distance = "(x - y):norm(2, -1)", digitize = "x:bucketize(boundaries)",
    histogram = "x:histc(bins, low, high)",
    new_zeros = "lac.zeros{ ..., dtype = x:dtype() }", new_ones = "lac.ones{ ..., dtype = x:dtype() }",
    new_empty = "lac.empty{ ..., dtype = x:dtype() }",
    new_full = "lac.full({ ... }, value, { dtype = x:dtype() })",
    new_tensor = "lac.tensor(values, { dtype = x:dtype() })",
  },
  -- lac.name
  lac = {
    scaled_dot_product_attention = "lac.attend(q, k, v, { segments = { n }, dilations = { 1 } })",
    tril_indices = "lac.ones{ n, m }:tril():nonzero():t()",
    triu_indices = "lac.ones{ n, m }:triu():nonzero():t()",
    as_tensor = "lac.tensor(values)", asarray = "lac.tensor(values)", scalar_tensor = "lac.tensor(value)",
    range = "lac.arange{ low, high + 1 }", normal = "low + high * lac.randn{ n }",
    randint_like = "lac.randint{ ..., high = n }", isin = "x:unsqueeze(-1):eq(v):any(-1)",
    trapezoid = "(v:narrow(1, 2, n - 1) + v:narrow(1, 1, n - 1)):sum() / 2",
    trapz = "(v:narrow(1, 2, n - 1) + v:narrow(1, 1, n - 1)):sum() / 2",
    hann_window = "0.5 - 0.5 * (lac.arange{ n } * (2 * math.pi / n)):cos()",
    hamming_window = "0.54 - 0.46 * (lac.arange{ n } * (2 * math.pi / n)):cos()",
    glu = "a * b:sigmoid(), of a, b = unpack(x:chunk(2, dim))",
    gumbel_softmax = "((x - (-lac.rand_like(x):log()):log()) / tau):softmax(dim)",
    binary_cross_entropy = "lac.binary_cross_entropy_with_logits(x:logit(), y)",
    batch_norm = "lac.group_norm(x, groups)", instance_norm = "lac.group_norm(x, channels)",
    broadcast_tensors = "x:expand(...)", dstack = "lac.stack(list, 3)", row_stack = "lac.cat(list, 1)",
    conv2d = "; of convolutions there is conv1d", lstm = "; there are no recurrent layers",
    gru = "; there are no recurrent layers", fft = "; there are no Fourier transforms",
    autocast = 'a model of that dtype: lac.nn.LongNetLM{ ..., dtype = "bf16" }',
    use_deterministic_algorithms = "; the same call gives the same bits each time, always",
    set_float32_matmul_precision = "lac.use_tf32(true)", get_num_threads = "lac.threads()",
    get_default_dtype = "lac.default_dtype()", get_default_device = "lac.default_device()",
    get_rng_state = "lac.rng_state()", initial_seed = "lac.rng_state()", seed = "lac.manual_seed(n)",
    vmap = "operators on tensors with one more dimension: they broadcast",
    concat = "lac.cat(list, dim)", concatenate = "lac.cat(list, dim)", hstack = "lac.cat(list, 2)",
    vstack = "lac.cat(list, 1)", column_stack = "lac.stack(list, 2)",
    load = "lac.io.load(path)", save = "lac.io.save(path, tensors)",
    from_numpy = "lac.io.load(path) of a .safetensors file", logspace = "10 ^ lac.linspace(low, high, n)",
    set_grad_enabled = "lac.no_grad(fn) and lac.enable_grad(fn)", inference_mode = "lac.no_grad(fn)",
    autograd = "lac.grad, lac.custom_op, lac.no_grad", compile = "lac.graph(fn), on cuda",
    functional = "lac itself: lac.relu(x), lac.softmax(x, dim)",
    set_default_dtype = "lac.default_dtype(name)", set_default_device = "lac.default_device(name)",
    clip_grad_norm_ = "optimizer:step{ clip = largest norm }", numel = "x:numel()",
    device_count = "lac.devices()", is_available = "lac.devices()",
    distributed = "; one process is one rank, and the variant ring of lac.attention shards within it",
    utils = "lac.data, lac.io and lac.train", linalg = NO_ALGEBRA, frexp = NO_FUNCTION,
    amp = 'a model of that dtype: lac.nn.LongNetLM{ ..., dtype = "bf16" }',
    complex = "; there are no complex numbers",
    set_num_threads = "lac.threads(n)", set_printoptions = "the options of the module lacuna.pretty",
  },
  -- lac.nn.name
  nn = {
    MultiheadAttention = 'nn.MultiheadDilatedAttention{ variant = "dense" }',
    TransformerEncoder = "nn.LongNetEncoder", TransformerEncoderLayer = "nn.Block",
    TransformerDecoder = "nn.LongNetLM", Transformer = "nn.LongNetEncoderDecoder",
    Parameter = "self:param(name, tensor) in init of an nn.module",
    ModuleDict = "fields of an nn.module: self.name = module", functional = "lac.relu(x) and the like",
    ParameterList = "self:param(name .. i, tensor) in a loop in init of an nn.module",
    TransformerDecoderLayer = "nn.Block", BatchNorm1d = "nn.GroupNorm", InstanceNorm1d = "nn.GroupNorm",
    AvgPool1d = "lac.avg_pool1d(x, size)", MaxPool1d = "lac.max_pool1d(x, size)",
    ConstantPad1d = "lac.pad(x, { before, after })", ZeroPad1d = "lac.pad(x, { before, after })",
    ReflectionPad1d = 'lac.pad(x, amounts, { mode = "reflect" })',
    Flatten = "x:flatten(2)", Unflatten = "x:view(...)", Unfold = "x:unfold(dim, size, step)",
    CosineSimilarity = "lac.cosine_similarity(x, y, dim)", PairwiseDistance = "(x - y):norm(2, -1)",
    Hardswish = "lac.hardswish(x)", Hardsigmoid = "lac.hardsigmoid(x)", Hardtanh = "lac.hardtanh(x)",
    ReLU6 = "lac.relu6(x)", CELU = "lac.celu(x)", SELU = "lac.selu(x)", Softsign = "lac.softsign(x)",
    LogSigmoid = "lac.logsigmoid(x)", Softshrink = "lac.softshrink(x)", Hardshrink = "lac.hardshrink(x)",
    Tanhshrink = "x - x:tanh()", Threshold = "lac.threshold(x, threshold, value)",
    Softmin = "(-x):softmax(dim)",
    PReLU = "lac.where(x:gt(0), x, weight * x)", GLU = "a * b:sigmoid(), of a, b = unpack(x:chunk(2, dim))",
    BCELoss = "nn.BCEWithLogitsLoss", EmbeddingBag = "nn.Embedding and a sum over its positions",
    Conv2d = "; of convolutions there is Conv1d", LSTM = "; there are no recurrent layers",
    GRU = "; there are no recurrent layers", RNN = "; there are no recurrent layers",
    DataParallel = "; one process is one device", DistributedDataParallel = "; one process is one device",
    init = "layer.weight:copy_(values) in lac.no_grad", utils = "optimizer:step{ clip = largest norm }",
  },
  -- fields of a module m
  module = {
    half = 'm:to("f16")', bfloat16 = 'm:to("bf16")', float = 'm:to("f32")', double = 'm:to("f64")',
    cuda = 'm:to("cuda")', cpu = 'm:to("cpu")', type = "m:to(dtype)", to_empty = "m:to(device)",
    requires_grad_ = "p:requires_grad_(false) for every p in m:parameters()",
    named_modules = "m:modules()", named_children = "m:children()", get_parameter = "m:named_parameters()",
    buffers = "m:state_dict()", named_buffers = "m:state_dict()", num_parameters = "m:parameter_count()",
    numel = "m:parameter_count()", extra_repr = "a method extra() that returns a text",
    add_module = "self.name = module", register_module = "self.name = module",
    register_buffer = "self:buffer(name, t)", register_parameter = "self:param(name, t)",
    register_forward_hook = "; there are no hooks: a module of your own holds this one and calls it",
    register_full_backward_hook = "; there are no hooks: lac.custom_op has a backward of your own",
    compile = "lac.graph(fn), on cuda", share_memory = "; one process is one model",
  },
  -- fields of an optimizer o
  optimizer = {
    learning_rate = "o.lr", decay = "o.weight_decay",
    param_groups = "o.lr = 1e-4, o:step{ factor = f }, or lac.optim.adamw{ { weight, lr = 1e-3 }, { bias } }",
    add_param_group = "lac.optim.adamw{ { weight, lr = 1e-3 }, { bias } }",
    clip_grad_norm_ = "o:step{ clip = largest norm }", clip = "o:step{ clip = largest norm }",
    state = "o:state_dict()", defaults = "o:config()", options = "o:config() to read, o.lr = 1e-4 to write",
    zero_grads = "o:zero_grad()",
  },
  dtype = {
    float32 = "f32", float = "f32", fp32 = "f32", float64 = "f64", double = "f64", fp64 = "f64",
    float16 = "f16", half = "f16", fp16 = "f16", bfloat16 = "bf16", int64 = "i64", long = "i64",
    int32 = "i32", int = "i32", uint8 = "u8", byte = "u8", boolean = "bool",
  },
}
