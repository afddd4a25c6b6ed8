"use strict";
// The page's only script: the theme button and the token pickers (ditlab.pages.token_picker packs the maps).

const printing = window.matchMedia("print");
const system = window.matchMedia("(prefers-color-scheme: dark)");
const redraws = [];

// ---------------------------------------------------------------- themes

function chosenTheme() {
  return document.documentElement.dataset.theme || (system.matches ? "dark" : "light");
}

function theme() {
  return printing.matches ? "light" : chosenTheme();
}

function showTheme() {
  const chosen = document.documentElement.dataset.theme;
  for (const source of document.querySelectorAll("picture source")) {
    source.media = !chosen ? "screen and (prefers-color-scheme: dark)" : chosen === "dark" ? "screen" : "not all";
  }
  const button = document.getElementById("theme");
  button.textContent = chosenTheme() === "dark" ? "Light" : "Dark";
  button.setAttribute("aria-label", `Show the page in ${button.textContent.toLowerCase()} colours`);
  redraws.forEach((redraw) => redraw());
}

document.getElementById("theme").hidden = false;
document.getElementById("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = chosenTheme() === "dark" ? "light" : "dark";
  showTheme();
});
system.addEventListener("change", showTheme);
printing.addEventListener("change", showTheme);

// ---------------------------------------------------------------- colours

const RAMPS = {
  light: [[255, 255, 255], [158, 202, 225], [11, 92, 173], [8, 28, 58]],
  dark: [[21, 24, 28], [29, 78, 137], [79, 169, 230], [255, 246, 210]],
};
const INKS = {
  light: { window: "#6a727c", mark: "#d55e00", around: "#ffffff" },
  dark: { window: "#9aa3ad", mark: "#ff8f4d", around: "#000000" },
};

/** Red, green and blue as a pixel of ImageData; every browser runs on little-endian machines. */
const pixelOf = (r, g, b) => ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;

/** For each theme the pixels of the shares 0/255, 1/255, ..., 255/255: hundreds of maps are drawn at each move. */
const SHADES = Object.fromEntries(Object.entries(RAMPS).map(([name, stops]) => {
  const shade = (step) => {
    const place = (step / 255) * (stops.length - 1);
    const low = Math.min(Math.floor(place), stops.length - 2);
    return pixelOf(...stops[low].map((value, i) => Math.round(value + (place - low) * (stops[low + 1][i] - value))));
  };
  return [name, Uint32Array.from({ length: 256 }, (_, step) => shade(step))];
}));

// ---------------------------------------------------------------- packed numbers

function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
}

/** What the pickers need beside JavaScript itself; browsers from before 2023 lack one or the other. */
const able = "DecompressionStream" in window && "OffscreenCanvas" in window;

async function inflate(base64) {
  const stream = new Blob([bytesOf(base64)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;

// ---------------------------------------------------------------- the picker

function startPicker(figure) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const [rows, columns] = data.grid;
  const tokens = rows * columns;
  const pickable = { rows: Math.ceil(rows / data.stride), columns: Math.ceil(columns / data.stride) };
  const queries = pickable.rows * pickable.columns;
  const select = (name) => figure.querySelector(`select[name=${name}]`);
  const said = figure.querySelector(".picker-said");
  const images = [...figure.querySelectorAll(".picker-image")];
  const area = figure.querySelector(".picker-maps");
  const unpacked = new Map();
  // The picked token, counted in tokens that can be picked.
  const picked = { row: Math.floor(pickable.rows / 2), column: Math.floor(pickable.columns / 2), held: false };
  let shown = [];
  let asked = 0;

  const row = () => picked.row * data.stride;
  const column = () => picked.column * data.stride;
  const level = () => Number(select("level").value);

  function option(list, value, text) {
    list.append(new Option(text, value));
  }

  function fillControls() {
    const layers = [...new Set(data.runs.flatMap((run) => run.layers.map((one) => one.layer)))].sort((a, b) => a - b);
    option(select("layer"), "all", "all layers");
    layers.forEach((layer) => option(select("layer"), layer, `layer ${layer}`));
    option(select("head"), "0", "mean over heads");
    const heads = Math.max(...data.runs.map((run) => run.heads));
    if (heads > 1) {
      option(select("head"), "all", "each head");
      for (let head = 1; head <= heads; head += 1) option(select("head"), head, `head ${head}`);
    }
    const kept = (index) => data.runs.some((run) => Object.keys(run.maps).some((key) => key.startsWith(`${index}.`)));
    data.levels.forEach((name, index) => kept(index) && option(select("level"), index, name));
    const middle = Math.floor(data.levels.length / 2);
    if (kept(middle)) select("level").value = middle;
    for (const list of figure.querySelectorAll("select")) list.addEventListener("change", arrange);
  }

  /** Asked for: every (run, layer, head) to show, in order. */
  function wanted() {
    const layer = select("layer").value;
    const head = select("head").value;
    return data.runs.map((run) => {
      const layers = run.layers.filter((one) => layer === "all" || one.layer === Number(layer));
      const heads = head === "all" ? [...Array(run.heads).keys()].map((i) => i + 1) : [Number(head)];
      return layers.flatMap((one) => heads.map((h) => ({ run, ...one, head: run.heads === 1 ? 0 : h })))
        .filter((one) => `${level()}.${one.layer}.${one.head}` in run.maps);
    });
  }

  /** Lays out a canvas for each map that is asked for, and unpacks what is shown for the first time. */
  async function arrange() {
    asked += 1;
    const mine = asked;
    area.setAttribute("aria-busy", "true");
    const strips = wanted();
    await Promise.all(strips.flat().map(async (one) => {
      one.key = `${data.runs.indexOf(one.run)}.${level()}.${one.layer}.${one.head}`;
      if (!unpacked.has(one.key)) {
        const content = await inflate(one.run.maps[`${level()}.${one.layer}.${one.head}`]);
        const largest = new Float32Array(content.slice(queries * tokens).buffer);
        unpacked.set(one.key, { scaled: content.subarray(0, queries * tokens), largest });
      }
      one.boxBytes = one.boxes && bytesOf(one.boxes);
    }));
    if (mine !== asked) return;
    area.replaceChildren();
    shown = strips.flat();
    strips.forEach((strip, i) => {
      const run = data.runs[i];
      const title = document.createElement("p");
      title.className = "picker-run";
      if (run.slot !== null) {
        const swatch = document.createElement("span");
        swatch.className = `swatch s${run.slot % 6}`;
        title.append(swatch);
      }
      title.append(strip.length ? run.label : `${run.label}: no such map on this page`);
      const list = document.createElement("div");
      list.className = strip.length === 1 ? "picker-strip single" : "picker-strip";
      for (const one of strip) list.append(frame(one));
      area.append(title, list);
    });
    draw();
    area.setAttribute("aria-busy", "false");
  }

  function frame(one) {
    const box = document.createElement("div");
    one.canvas = document.createElement("canvas");
    one.canvas.setAttribute("role", "img");
    Object.assign(one.canvas.dataset, { layer: one.layer, head: one.head, run: one.run.label });
    one.canvas.addEventListener("pointermove", (event) => tellWeight(one, event));
    one.canvas.addEventListener("pointerleave", tell);
    one.words = document.createElement("p");
    one.words.className = "note";
    box.append(one.canvas, one.words);
    return box;
  }

  const headName = (one) => (one.head ? `head ${one.head}` : one.run.heads > 1 ? "mean over heads" : "its head");

  function weights(one) {
    const { scaled, largest } = unpacked.get(one.key);
    const query = picked.row * pickable.columns + picked.column;
    const values = new Float32Array(tokens);
    for (let i = 0; i < tokens; i += 1) values[i] = (scaled[query * tokens + i] / 255) * largest[query];
    return values;
  }

  /** Place of a weight on a logarithmic scale from a quarter of the uniform weight (0) to a quarter of all weight (1). */
  const relative = (value) => Math.log(4 * tokens * value) / Math.log(Math.max(tokens, 2));

  /** Share of the weight within the 3x3 tokens around the picked one, and the mean distance in tokens. */
  function numbers(values) {
    let sum = 0;
    let near = 0;
    let far = 0;
    for (let i = 0; i < tokens; i += 1) {
      const down = Math.floor(i / columns) - row();
      const right = (i % columns) - column();
      sum += values[i];
      far += values[i] * Math.hypot(down, right);
      if (Math.max(Math.abs(down), Math.abs(right)) <= 1) near += values[i];
    }
    return { near: near / sum, distance: far / sum };
  }

  function size(canvas) {
    const scale = Math.max(4, Math.ceil(256 / Math.max(rows, columns)));
    if (canvas.width !== columns * scale || canvas.height !== rows * scale) {
      canvas.width = columns * scale;
      canvas.height = rows * scale;
    }
    return scale;
  }

  function outline(context, scale, box, color, width, dash = []) {
    const [top, bottom, left, right] = box;
    context.setLineDash(dash);
    context.strokeStyle = color;
    context.lineWidth = width;
    const inset = width / 2;
    context.strokeRect(left * scale + inset, top * scale + inset, (right - left + 1) * scale - width,
      (bottom - top + 1) * scale - width);
  }

  /** A frame around the picked token that leaves the token itself to be seen; with a second one on pictures. */
  function mark(context, scale, onPicture) {
    const ink = INKS[theme()];
    const width = Math.max(2, scale / 6);
    const frame = (out, color) =>
      outline(context, scale, [row() - out, row() + out, column() - out, column() + out], color, width);
    frame(width / scale, ink.mark);
    if (onPicture) frame((2 * width) / scale, ink.around);
  }

  function paint(canvas, width, height, pixel) {
    const small = new OffscreenCanvas(width, height);
    const content = new ImageData(width, height);
    const pixels = new Uint32Array(content.data.buffer);
    for (let i = 0; i < pixels.length; i += 1) pixels[i] = pixel(i);
    small.getContext("2d").putImageData(content, 0, 0);
    const scale = size(canvas);
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, canvas.width, canvas.height);
    return [context, scale];
  }

  const pictures = { clean: bytesOf(data.image), noisy: data.noisy.map(bytesOf) };

  function drawImages() {
    for (const canvas of images) {
      const bytes = canvas.dataset.which === "clean" ? pictures.clean : pictures.noisy[level()];
      if (!bytes) continue;
      const [height, width] = data.size;
      const colour = (i) => pixelOf(bytes[3 * i], bytes[3 * i + 1], bytes[3 * i + 2]);
      const [context, scale] = paint(canvas, width, height, colour);
      mark(context, scale, true);
    }
  }

  function draw() {
    const shades = SHADES[theme()];
    const ink = INKS[theme()];
    drawImages();
    const found = shown.map((one) => ({ one, values: weights(one) }));
    const tops = found.map(({ values }) => values.reduce((a, b) => Math.max(a, b), 0));
    const all = Math.max(...tops);
    const chosen = select("scale").value;
    found.forEach(({ one, values }, i) => {
      const share = chosen === "uniform" ? relative : (value) => value / (chosen === "same" ? all : tops[i]);
      const shade = (k) => shades[Math.min(255, Math.max(0, Math.round(255 * share(values[k]))))];
      const [context, scale] = paint(one.canvas, columns, rows, shade);
      if (one.boxBytes) {
        const at = 4 * (picked.row * pickable.columns + picked.column);
        const out = 1.5 / scale;
        const [first, last, left, right] = one.boxBytes.slice(at, at + 4);
        outline(context, scale, [first - out, last + out, left - out, right + out], ink.window, 1.5, [5, 3]);
      }
      mark(context, scale, false);
      one.near = numbers(values);
      const name = select("head").value === "all" ? headName(one) : `layer ${one.layer}`;
      const both = select("layer").value === "all" && select("head").value === "all";
      one.words.textContent = `${both ? `layer ${one.layer}, ` : ""}${name}\n3×3: ${percent(one.near.near)}\n`
        + `distance: ${one.near.distance.toFixed(1)}\nmax: ${tops[i].toPrecision(2)}`;
      one.canvas.setAttribute("aria-label", `${one.run.label}, layer ${one.layer} (${one.pattern}), ${headName(one)}: `
        + one.words.textContent.split("\n").slice(1).join(", "));
    });
    tell();
  }

  function tell() {
    const parts = data.runs.map((run) => {
      const mine = shown.filter((one) => one.run === run);
      if (!mine.length) return `${run.label}: no such map`;
      const mean = (get) => mine.reduce((sum, one) => sum + get(one.near), 0) / mine.length;
      return `${run.label} gives ${percent(mean((n) => n.near))} of its weight to the 3×3 tokens around it, at a mean `
        + `distance of ${mean((n) => n.distance).toFixed(1)} tokens`;
    });
    const which = shown.length > data.runs.length ? " (means of the maps shown)" : "";
    const token = `Token in row ${row()}, column ${column()}${picked.held ? ", held" : ""}`;
    said.textContent = `${token}: ${parts.join("; ")}${which}.`;
  }

  function tellWeight(one, event) {
    const [r, c] = place(one.canvas, event, 1);
    const value = weights(one)[r * columns + c];
    said.textContent = `${one.run.label}, layer ${one.layer}, ${headName(one)}: token (${row()}, ${column()}) gives `
      + `token (${r}, ${c}) a weight of ${value.toPrecision(2)}.`;
  }

  /** Row and column under the pointer, in steps of `stride` tokens. */
  function place(canvas, event, stride) {
    const box = canvas.getBoundingClientRect();
    const within = (share, count) => Math.min(Math.max(Math.floor(share * count), 0), count - 1);
    return [
      Math.floor(within((event.clientY - box.top) / box.height, rows) / stride),
      Math.floor(within((event.clientX - box.left) / box.width, columns) / stride),
    ];
  }

  function pick(newRow, newColumn) {
    const clamp = (value, count) => Math.min(Math.max(value, 0), count - 1);
    picked.row = clamp(newRow, pickable.rows);
    picked.column = clamp(newColumn, pickable.columns);
    draw();
  }

  for (const canvas of images) {
    canvas.addEventListener("pointermove", (event) => {
      if (event.pointerType === "mouse" && picked.held) return;
      pick(...place(canvas, event, data.stride));
    });
    canvas.addEventListener("click", (event) => {
      // A tap has no hovering to hold against; only a mouse lets go again.
      picked.held = event.pointerType === "mouse" && !picked.held;
      pick(...place(canvas, event, data.stride));
    });
  }
  images[0].addEventListener("keydown", (event) => {
    const moves = {
      ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
      Home: [0, -columns], End: [0, columns], PageUp: [-rows, 0], PageDown: [rows, 0],
    };
    if (!(event.key in moves) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    pick(picked.row + moves[event.key][0], picked.column + moves[event.key][1]);
  });

  redraws.push(() => shown.length && draw());
  fillControls();
  figure.querySelector(".picker-idle").hidden = true;
  figure.querySelector(".picker-live").hidden = false;
  drawImages();
  return arrange();
}

showTheme();

const waiting = new Set(document.querySelectorAll(".picker"));

function start(figure) {
  return waiting.delete(figure) ? startPicker(figure) : null;
}

/** Starts what nobody has scrolled to yet, one at a time, so that all maps are there when the page is printed. */
async function startRest() {
  for (const figure of waiting) {
    await start(figure);
    await new Promise((resolve) => idle(resolve));
  }
}

const idle = window.requestIdleCallback || ((then) => setTimeout(then, 50));

if (able) {
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        seen.unobserve(entry.target);
        start(entry.target);
      }
    }
  }, { rootMargin: "600px" });
  waiting.forEach((figure) => seen.observe(figure));
  window.addEventListener("load", () => idle(startRest));
  window.addEventListener("beforeprint", () => waiting.forEach(start));
} else {
  for (const figure of waiting) {
    figure.querySelector(".picker-idle").textContent =
      "Picking a token needs a newer browser (with DecompressionStream and OffscreenCanvas); "
      + "the figures of this section do not.";
  }
}
