// Samples a flower as noisout_nb.generate.sample_image does: the same noise for the same seed, the
// same timesteps, guidance and steps of DPM-Solver++. A worker, so that the page stays alive meanwhile.

importScripts("demo/ort.wasm.min.js");

let settings, session, stopped = false;

onmessage = async ({ data }) => {
  if (data.stop) { stopped = true; return; }
  stopped = false;
  try {
    session ??= await load(data.settings);
    const done = await sample(data);
    postMessage({ done, stopped });
  } catch (error) {
    session = undefined;
    postMessage({ error: String(error.message ?? error) });
  }
};

async function load(given) {
  settings = given;
  const base = new URL("demo/", location.href);
  const sizes = { "wasm.bin": 0, "flowers.bin": 0 };
  const note = () => postMessage({ loaded: sizes["wasm.bin"] + sizes["flowers.bin"] });
  const [wasm, model] = await Promise.all(
    Object.keys(sizes).map((name) => unpacked(new URL(name, base), (n) => { sizes[name] += n; note(); })));
  postMessage({ starting: true });
  ort.env.wasm.numThreads = 1; // more need a cross-origin isolated page
  ort.env.wasm.wasmBinary = wasm;
  ort.env.wasm.wasmPaths = { mjs: new URL("ort-wasm-simd-threaded.mjs", base).href };
  return ort.InferenceSession.create(new Uint8Array(model), { executionProviders: ["wasm"] });
}

// The bytes of a gzipped file; `count` is told how many have come
async function unpacked(url, count) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url.pathname}: ${response.status}`);
  const counted = new TransformStream({
    transform(chunk, controller) { count(chunk.length); controller.enqueue(chunk); },
  });
  const stream = response.body.pipeThrough(counted).pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

// PyTorch's generator on the CPU: mt19937, and its torch.randn for at least 16 numbers (a multiple
// of 16), which makes Box-Muller pairs of the numbers j and j + 8 of each 16.
function randn(count, seed) {
  const state = new Uint32Array(624);
  state[0] = seed;
  for (let i = 1; i < 624; i++) {
    state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
  }
  let next = 624;
  const random = () => {
    if (next === 624) {
      for (let i = 0; i < 624; i++) {
        const y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
        state[i] = state[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      next = 0;
    }
    let y = state[next++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  };
  const x = Float32Array.from({ length: count }, () => (random() & 0xffffff) / 2 ** 24);
  for (let i = 0; i < count; i += 16) {
    for (let j = i; j < i + 8; j++) {
      const radius = Math.sqrt(-2 * Math.log(1 - x[j])), angle = 2 * Math.PI * x[j + 8];
      x[j] = radius * Math.cos(angle);
      x[j + 8] = radius * Math.sin(angle);
    }
  }
  return x;
}

// GaussianDiffusion.spaced_timesteps(steps, "uniform"); halves are rounded to even numbers
function timesteps(steps, T) {
  return Array.from({ length: steps }, (_, i) => {
    const exact = ((i + 1) * T) / steps, low = Math.floor(exact);
    const up = exact - low > 0.5 || (exact - low === 0.5 && low % 2 === 1);
    return low + (up ? 1 : 0) - 1;
  });
}

// ClassifierFreeGuidance in an interval of noise levels: x_0, clamped
async function predict(x, t, alphaBar, species, scale) {
  const sigma = Math.sqrt((1 - alphaBar) / alphaBar);
  const [low, high] = settings.guidance_interval ?? [-1, Infinity];
  const guided = scale !== 1 && low < sigma && sigma <= high;
  const labels = guided ? [species, settings.classes.length] : [species];
  const size = settings.image_size, n = labels.length, both = new Float32Array(n * x.length);
  for (let i = 0; i < n; i++) both.set(x, i * x.length);
  const { output } = await session.run({
    x: new ort.Tensor("float32", both, [n, 3, size, size]),
    t: new ort.Tensor("int64", BigInt64Array.from(labels, () => BigInt(t)), [n]),
    y: new ort.Tensor("int64", BigInt64Array.from(labels, BigInt), [n]),
  });
  return x.map((_, i) => {
    const plain = output.data[i];
    const value = guided ? plain + (scale - 1) * (plain - output.data[x.length + i]) : plain;
    return Math.min(1, Math.max(-1, value));
  });
}

// DPM-Solver++(2M), as sampling.dpm_solver: DDIM towards an x_0 that is extrapolated from the last two
async function sample({ species, seed, scale, steps }) {
  const size = settings.image_size, T = settings.alphas_cumprod.length;
  let x = randn(3 * size * size, Math.imul(2654435769, seed) >>> 0); // sampling.image_generator
  postMessage({ step: 0, t: T - 1, x, start: null });
  const kept = timesteps(steps, T), alphaBars = kept.map((t) => settings.alphas_cumprod[t]);
  const lambda = alphaBars.map((alphaBar) => Math.log(alphaBar / (1 - alphaBar)) / 2);
  let before = null;
  for (let i = steps - 1; i >= 0; i--) {
    await new Promise((resolve) => setTimeout(resolve)); // lets a stop in
    if (stopped) return false;
    const a = Math.sqrt(alphaBars[i]), b = Math.sqrt(1 - alphaBars[i]);
    const next = i > 0 ? alphaBars[i - 1] : 1;
    const c = Math.sqrt(next), d = Math.sqrt(1 - next);
    const start = await predict(x, kept[i], alphaBars[i], species, scale);
    let target = start;
    if (before && i > 0) {
      const ratio = (lambda[i - 1] - lambda[i]) / (lambda[i] - lambda[i + 1]);
      target = start.map((value, j) => value + (ratio / 2) * (value - before[j]));
    }
    x = x.map((value, j) => c * target[j] + (d * (value - a * target[j])) / b);
    before = start;
    postMessage({ step: steps - i, t: kept[i], x, start });
  }
  return true;
}
