// The page "A flower in your browser": its form, its two images, and what it says meanwhile.

(() => {
  const form = document.getElementById("flower");
  const field = (name) => form.elements[name];
  const status = document.getElementById("flower-status");
  const progress = document.getElementById("flower-progress");
  const images = { x: document.getElementById("flower-x"), start: document.getElementById("flower-start") };
  const here = new URL(".", document.currentScript.src);
  let settings, worker, began, what;

  const say = (text) => { status.textContent = text; };
  const busy = (is) => {
    field("go").disabled = is;
    field("stop").disabled = !is;
    for (const name of ["species", "seed", "scale", "steps", "another"]) field(name).disabled = is;
    form.setAttribute("aria-busy", is);
  };

  function show(canvas, values) {
    const size = settings.image_size, plane = size * size;
    const pixels = new ImageData(size, size);
    for (let i = 0; i < plane; i++) {
      // a Uint8ClampedArray rounds to the nearest, and halves to even, as torch.round does
      for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = (values[c * plane + i] + 1) * 127.5;
      pixels.data[4 * i + 3] = 255;
    }
    canvas.getContext("2d").putImageData(pixels, 0, 0);
  }

  function heard({ data }) {
    if (data.error) { busy(false); say(`It failed: ${data.error}`); return; }
    if (data.loaded) { say(`Loading the network: ${(data.loaded / 1e6).toFixed(1)} MB`); return; }
    if (data.starting) { say("Starting the network"); return; }
    if (data.x) {
      show(images.x, data.x);
      if (data.start) show(images.start, data.start);
      progress.value = data.step;
      // a screen reader is told every fifth step
      if (data.step % 5 === 0) say(`Step ${data.step} of ${progress.max}, timestep ${data.t}`);
      return;
    }
    busy(false);
    if (!data.done) { say("Stopped"); return; }
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    say(`Done: ${what}, in ${seconds} seconds`);
    images.x.setAttribute("aria-label", `The generated image: ${what}`);
    field("save").disabled = false;
    form.dataset.done = what;
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const numbers = Object.fromEntries(
      ["species", "seed", "scale", "steps"].map((name) => [name, Number(field(name).value)]));
    what = `${settings.classes[numbers.species]}, seed ${numbers.seed}`;
    delete form.dataset.done;
    progress.max = numbers.steps;
    progress.value = 0;
    began = performance.now();
    busy(true);
    field("save").disabled = true;
    say("Loading the network");
    images.start.getContext("2d").clearRect(0, 0, settings.image_size, settings.image_size);
    if (!worker) {
      worker = new Worker(new URL("flower-worker.js", here));
      worker.onmessage = heard;
      worker.onerror = (event) => heard({ data: { error: event.message ?? "no worker" } });
    }
    worker.postMessage({ settings, ...numbers });
  });
  field("stop").addEventListener("click", () => worker.postMessage({ stop: true }));
  field("another").addEventListener("click", () => {
    field("seed").value = Math.floor(Math.random() * 10000);
    form.requestSubmit();
  });
  for (const name of ["scale", "steps"]) {
    field(name).addEventListener("input", () => { field(`${name}-shown`).value = field(name).value; });
  }
  field("save").addEventListener("click", () => {
    images.x.toBlob((blob) => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(blob);
      link.download = `${what.replace(/\W+/g, "-")}.png`;
      link.click();
      URL.revokeObjectURL(link.href);
    });
  });

  if (location.protocol === "file:") {
    say("This page needs a web server. In the repository: python -m http.server --directory build/site/html");
    return;
  }
  fetch(new URL("demo/flowers.json", here)).then((response) => response.json()).then((read) => {
    settings = read;
    const names = read.classes.map((name, label) => [name, label]).sort((a, b) => (a[0] < b[0] ? -1 : 1));
    for (const [name, label] of names) field("species").add(new Option(name, label));
    field("species").value = Math.max(0, read.classes.indexOf("sunflower"));
    for (const [name, value] of [["scale", read.guidance_scale], ["steps", read.steps]]) {
      field(name).value = value;
      field(`${name}-shown`).value = value;
    }
    for (const canvas of Object.values(images)) canvas.width = canvas.height = read.image_size;
    busy(false);
    say("Ready. The first flower loads the network (15 MB); the next ones need no network connection.");
  }, (error) => say(`The page's files are missing: ${error.message}`));
})();
