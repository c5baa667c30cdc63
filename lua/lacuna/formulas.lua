--- What each elementwise function computes, in a line: what help("gelu") shows.
--
-- The engine's own list, c/maps.def, has the formulas in C with their derivatives; it is not part of an
-- installation, and constants written out are no explanation. A spec holds this list against the operators.

local formulas = {}

--- By the function's name; x, y and z are its tensors.
formulas.text = {
  neg = "-x", abs = "|x|; its gradient at 0 is 0", sign = "-1, 0 or 1", square = "x^2",
  relu = "max(x, 0); NaN stays", floor = "the integer at or below x", ceil = "the integer at or above x",
  round = "the nearest integer, halves to the even one", trunc = "x without its fraction, towards 0",
  frac = "x - trunc(x), with the sign of x",
  exp = "e^x", expm1 = "e^x - 1, exact near 0", exp2 = "2^x",
  log = "the natural logarithm", log1p = "log(1 + x), exact near 0", log2 = "the logarithm to base 2",
  log10 = "the logarithm to base 10",
  sqrt = "the square root", rsqrt = "1 / sqrt(x)", recip = "1 / x",
  sin = "the sine, of radians", cos = "the cosine, of radians", tan = "the tangent, of radians",
  asin = "the inverse sine, of [-1, 1]", acos = "the inverse cosine, of [-1, 1]",
  atan = "the inverse tangent",
  sinh = "(e^x - e^-x) / 2", cosh = "(e^x + e^-x) / 2", tanh = "(e^x - e^-x) / (e^x + e^-x)",
  asinh = "the inverse of sinh", acosh = "the inverse of cosh, of x >= 1",
  atanh = "the inverse of tanh, of (-1, 1)",
  sinc = "sin(pi x) / (pi x), and 1 at 0",
  erf = "2 / sqrt(pi) times the integral of e^(-t^2) from 0 to x", erfc = "1 - erf(x), exact for large x",
  sigmoid = "1 / (1 + e^-x)", logit = "log(x / (1 - x)), the inverse of sigmoid",
  logsigmoid = "log(sigmoid(x))",
  silu = "x sigmoid(x)",
  gelu = "x Phi(x) with the normal distribution function Phi, by erf (Hendrycks 2016)",
  gelu_tanh = "x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), an approximation of gelu",
  softplus = "log(1 + e^x), without overflow", mish = "x tanh(softplus(x)) (Misra 2019)",
  selu = "1.0507 x for x > 0, else 1.7581 (e^x - 1) (Klambauer et al. 2017)",
  relu6 = "x limited to [0, 6]", softsign = "x / (1 + |x|)", hardsigmoid = "(x + 3) / 6 limited to [0, 1]",
  hardswish = "x hardsigmoid(x) (Howard et al. 2019)",
  erfinv = "the inverse of erf, of [-1, 1]; sqrt(2) erfinv(u) of a uniform u is a normal number",
  lgamma = "log |Gamma(x)|; infinite at 0, -1, -2, ...",
  digamma = "the derivative of lgamma; -inf at 0, inf at -0, NaN at negative whole numbers",
  isnan = "is x NaN? bool", isfinite = "is x neither NaN nor infinite? bool", isinf = "is x infinite? bool",
  logical_not = "not x, of bools", bitwise_not = "every bit of an integer changed",

  add = "x + y", sub = "x - y", mul = "x y",
  div = "x / y; of integers rounded down, and 0 where y is 0",
  pow = "x to the power y; of integers with y < 0: 0, unless x is 1 or -1",
  maximum = "the larger of x and y; NaN wins, equal ones share the gradient",
  minimum = "the smaller of x and y; NaN wins, equal ones share the gradient",
  mod = "x - y floor(x / y), with the sign of y, as % of Lua",
  fmod = "x - y trunc(x / y), with the sign of x",
  floor_divide = "floor(x / y)",
  atan2 = "the angle of the point (y, x): the first argument is the ordinate", hypot = "sqrt(x^2 + y^2)",
  copysign = "|x| with the sign of y", logaddexp = "log(e^x + e^y), without overflow",
  xlogy = "x log(y), and 0 where x is 0",
  swiglu = "silu(x) y (Shazeer 2020)", geglu = "gelu(x) y (Shazeer 2020)", squared_difference = "(x - y)^2",
  huber = "x^2 / 2 for |x| <= y, else y (|x| - y / 2)",
  bce_logits = "binary cross-entropy of sigmoid(x) against the target y, without overflow",
  eq = "x = y? bool", ne = "x ~= y? bool", lt = "x < y? bool", le = "x <= y? bool", gt = "x > y? bool",
  ge = "x >= y? bool",
  logical_and = "x and y, of bools", logical_or = "x or y, of bools",
  logical_xor = "x or y, not both, of bools",
  bitwise_and = "the bits that are in x and in y", bitwise_or = "the bits that are in x or in y",
  bitwise_xor = "the bits in which x and y differ",
  bitwise_left_shift = "x 2^y, of integers; bits that leave are lost",
  bitwise_right_shift = "floor(x / 2^y), of integers",

  clamp = "x limited to [low, high]", hardtanh = "x limited to [min, max]",
  threshold = "x where it is above the threshold, else the value",
  leaky_relu = "x for x > 0, else slope x", elu = "x for x > 0, else alpha (e^x - 1) (Clevert et al. 2016)",
  celu = "x for x > 0, else alpha (e^(x / alpha) - 1) (Barron 2017)",
  softshrink = "x - lambda above lambda, x + lambda below -lambda, else 0",
  hardshrink = "x outside of [-lambda, lambda], else 0",
  nan_to_num = "NaN, infinity and -infinity replaced by numbers",

  lerp = "x + w (y - x)", addcmul = "x + value y z", addcdiv = "x + value y / z",
}

--- Arguments of functions with constants, and what these are unless given.
formulas.arguments = {
  hardtanh = "(x, min = -1, max = 1)", threshold = "(x, threshold, value)",
  leaky_relu = "(x, slope = 0.01)",
  elu = "(x, alpha = 1)", celu = "(x, alpha = 1)", softshrink = "(x, lambda = 0.5)",
  hardshrink = "(x, lambda = 0.5)",
  nan_to_num = "(x, nan = 0, posinf = the dtype's largest, neginf = its lowest)",
  lerp = "(x, y, w), w a tensor or a number", addcmul = "(x, y, z, value = 1)",
  addcdiv = "(x, y, z, value = 1)",
}

return formulas
