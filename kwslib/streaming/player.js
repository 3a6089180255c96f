/* A keyword detector in a page: reads a .kws file and listens, with no other code.
   `kws` computes, in any JavaScript engine; `kwsPlayer`, below it, draws and needs a browser.
   It does what StreamingModel and Decision do in Python, compared with them. */
"use strict";
var kws = (function () {
const RATE = 16000, N_FFT = 400, HOP = 160, FLOOR = 1e-9, FIRST_S = 0.95;

function crc32(data) {
  let crc = -1;
  for (let i = 0; i < data.length; i++) {
    crc ^= data[i];
    for (let k = 0; k < 8; k++) crc = crc >>> 1 ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc >>> 0;
}

/* ---- the file: KWS1, length, description, tensors in its order, CRC-32 ---- */

function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return exponent ? sign * 2 ** (exponent - 25) * (1024 + fraction) : sign * fraction * 2 ** -24;
}

function read(file) {
  if (file.length < 10 || String.fromCharCode(...file.subarray(0, 4)) !== "KWS1")
    throw new Error("This is no detector: a .kws file begins with KWS1.");
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength), end = file.length - 4;
  if (view.getUint32(end, true) !== crc32(file.subarray(0, end)))
    throw new Error("This detector is damaged: its checksum does not fit. Copy or export it again.");
  const start = 6 + view.getUint16(4, true);
  const about = JSON.parse(String.fromCharCode(...file.subarray(6, start)));
  return { about, tensors: tensors(about, view, start, end) };
}

const FORMATS = { "float32": 32, "float16": 16, "weight-int8": 8, "weight-int4": 4 };

function tensors(about, view, at, end) {
  const bits = FORMATS[about.precision], found = {};
  if (!bits) throw new Error("Detectors of precision " + about.precision + " run in Python only: export another one.");
  const s = sizes(about), shapes = s.channels ? timeNetShapes(s) : crnnShapes(s);
  const floats = (n, wide) => {
    const out = new Float64Array(n);
    for (let i = 0; i < n; i++, at += wide ? 4 : 2)
      out[i] = wide ? view.getFloat32(at, true) : half(view.getUint16(at, true));
    return out;
  };
  for (const [name, shape] of shapes) {
    const n = shape.reduce((a, b) => a * b, 1);
    if (name.endsWith("num_batches_tracked")) at += bits > 8 ? 8 : 0;
    else if (bits > 8) found[name] = floats(n, bits === 32);
    else if (shape.length < 2) found[name] = floats(n, false);
    else {
      const whole = new Float64Array(n), row = n / shape[0];
      for (let i = 0; i < n; i++)
        whole[i] = bits === 8 ? view.getInt8(at + i) : (view.getUint8(at + (i >> 1)) >> 4 * (i & 1)) << 28 >> 28;
      at += bits === 8 ? n : n + 1 >> 1;
      const scale = floats(shape[0], false);
      found[name] = whole.map((w, i) => Math.fround(w * scale[i / row | 0]));
    }
  }
  if (at !== end) throw new Error("This detector does not fit its description: export it again.");
  return found;
}

const DEFAULTS = {
  TimeNetConfig: { channels: [24, 20, 32], kernels: [9, 11, 13], strides: [2, 2, 2], n_mels: 40, num_classes: 2,
                   hop_ms: 10 },
  CRNNConfig: { cnn_out_channels: 8, kernel_size: [5, 20], stride: [2, 8], hidden_size: 64, gru_num_layers: 2,
                attention_size: null, n_mels: 40, num_classes: 2, cell: "gru", separable: false }
};

function sizes(about) {
  const kind = about.model["class"].replace("Folded", "");
  if (!DEFAULTS[kind])
    throw new Error("A " + kind.replace("Config", "") + " reads whole clips: only a CRNN or a TimeNet listens.");
  if (about.model.cell === "lstm") throw new Error("Detectors with an LSTM run in Python only.");
  if (about.features && about.features.framing === "centered")
    throw new Error("This detector was trained on centered clips: it cannot listen to a stream.");
  return { ...DEFAULTS[kind], ...about.model };
}

function timeNetShapes(s) {
  const folded = s["class"].startsWith("Folded"), norm = (name, n) => folded ? [] :
    [[name + "running_mean", [n]], [name + "running_var", [n]], [name + "num_batches_tracked", []]];
  let size = s.n_mels, shapes = norm("norm.", size);
  s.channels.forEach((channels, i) => {
    const name = "blocks." + i + ".";
    shapes.push([name + "0.weight", [size, 1, s.kernels[i]]], [name + "1.weight", [channels, size, 1]]);
    if (folded) shapes.push([name + "1.bias", [channels]]);
    else shapes.push([name + "2.weight", [channels]], [name + "2.bias", [channels]]);
    shapes = shapes.concat(norm(name + "2.", channels));
    size = channels;
  });
  return shapes.concat(linearShapes("classifier", size, s.num_classes));
}

function linearShapes(name, inputs, outputs) {
  return [[name + ".weight", [outputs, inputs]], [name + ".bias", [outputs]]];
}

const GATES = { gru: 3, rnn: 1 };

function crnnShapes(s) {
  const c = s.cnn_out_channels, h = s.hidden_size, first = s.separable ? 1 : c;
  const bins = Math.floor((s.n_mels - s.kernel_size[0]) / s.stride[0]) + 1, rows = GATES[s.cell] * h;
  let shapes = [["conv.0.weight", [first, 1].concat(s.kernel_size)], ["conv.0.bias", [first]]];
  if (s.separable) shapes.push(["conv.1.weight", [c, 1, 1, 1]], ["conv.1.bias", [c]]);
  for (let l = 0, size = c * bins; l < s.gru_num_layers; l++, size = h)
    shapes.push(["gru.weight_ih_l" + l, [rows, size]], ["gru.weight_hh_l" + l, [rows, h]],
                ["gru.bias_ih_l" + l, [rows]], ["gru.bias_hh_l" + l, [rows]]);
  const inner = s.attention_size === null ? h : s.attention_size;
  shapes = shapes.concat(inner ? linearShapes("attention.energy.0", h, inner).concat(
    linearShapes("attention.energy.2", inner, 1)) : linearShapes("attention.energy", h, 1));
  return shapes.concat(linearShapes("classifier", h, s.num_classes));
}

/* ---- the front end: power spectrum, triangular mel filters (HTK scale, as torchaudio), natural log ---- */

const turn = i => 2 * Math.PI * i / N_FFT;
const COS = Float64Array.from({ length: N_FFT }, (_, i) => Math.cos(turn(i)));
const SIN = Float64Array.from({ length: N_FFT }, (_, i) => -Math.sin(turn(i)));
const WINDOW = COS.map(c => 0.5 - 0.5 * c);
const DIGITS = [5, 5, 4, 4], a = new Float64Array(5), b = new Float64Array(5);

/* Fourier transform of n = N_FFT / step values that lie `step` apart, by mixed radix; into re, im from `to` on. */
function fourier(x, from, step, depth, re, im, to) {
  if (depth === DIGITS.length) { re[to] = x[from]; im[to] = 0; return; }
  const p = DIGITS[depth], m = N_FFT / step / p;
  for (let r = 0; r < p; r++) fourier(x, from + r * step, step * p, depth + 1, re, im, to + r * m);
  for (let k = 0; k < m; k++) {
    for (let r = 0; r < p; r++) {
      const w = r * k * step % N_FFT, i = to + r * m + k;
      a[r] = re[i] * COS[w] - im[i] * SIN[w];
      b[r] = re[i] * SIN[w] + im[i] * COS[w];
    }
    for (let q = 0; q < p; q++) {
      let sumA = 0, sumB = 0;
      for (let r = 0; r < p; r++) {
        const w = r * q * (N_FFT / p) % N_FFT;
        sumA += a[r] * COS[w] - b[r] * SIN[w];
        sumB += a[r] * SIN[w] + b[r] * COS[w];
      }
      re[to + q * m + k] = sumA;
      im[to + q * m + k] = sumB;
    }
  }
}

function melFilters(n) {
  const mel = hz => 2595 * Math.log10(1 + hz / 700), hz = m => 700 * (10 ** (m / 2595) - 1);
  const edges = Array.from({ length: n + 2 }, (_, i) => hz(mel(RATE / 2) * i / (n + 1)));
  return Array.from({ length: n }, (_, i) => {
    const weights = [];
    for (let k = 0; k <= N_FFT / 2; k++) {
      const f = k * RATE / N_FFT;
      const up = (f - edges[i]) / (edges[i + 1] - edges[i]), down = (edges[i + 2] - f) / (edges[i + 2] - edges[i + 1]);
      if (Math.min(up, down) > 0) weights.push([k, Math.min(up, down)]);
    }
    return weights;
  });
}

function logMel(n) {
  const filters = melFilters(n), re = new Float64Array(N_FFT), im = new Float64Array(N_FFT);
  const windowed = new Float64Array(N_FFT);
  return frame => {
    for (let i = 0; i < N_FFT; i++) windowed[i] = frame[i] * WINDOW[i];
    fourier(windowed, 0, 1, 0, re, im, 0);
    return Float64Array.from(filters, filter => {
      let energy = 0;
      for (const [k, weight] of filter) energy += weight * (re[k] * re[k] + im[k] * im[k]);
      return Math.log(Math.min(Math.max(energy, FLOOR), 1 / FLOOR));
    });
  };
}

/* ---- the nets, a column at a time ---- */

/* W x + b, (rows, x.length) row by row */
function affine(weight, bias, x) {
  const n = x.length, out = new Float64Array(weight.length / n);
  for (let o = 0, i = 0; o < out.length; o++) {
    let sum = bias ? bias[o] : 0;
    for (let k = 0; k < n; k++) sum += weight[i++] * x[k];
    out[o] = sum;
  }
  return out;
}

/* Hands `kernel` columns to `compute` as soon as there are, then moves on by `stride`. */
function over(kernel, stride, compute) {
  const held = [];
  return column => {
    held.push(column);
    if (held.length < kernel) return null;
    const out = compute(held);
    held.splice(0, stride);
    return out;
  };
}

/* A normalisation as x * scale + shift; a folded net has none. */
function normalization(t, name) {
  if (!t[name + "running_var"]) return x => x;
  const of = (part, i, without) => t[name + part] ? t[name + part][i] : without;
  const scale = t[name + "running_var"].map((v, i) => of("weight", i, 1) / Math.sqrt(v + 1e-5));
  const shift = scale.map((s, i) => of("bias", i, 0) - s * of("running_mean", i));
  return x => x.map((value, i) => value * scale[i] + shift[i]);
}

/* The parts of a net: `column` takes a log-mel frame and gives, every few, the vector of a step or null. */
function timeNet(t, s) {
  const first = normalization(t, "norm.");
  const blocks = s.channels.map((_, i) => {
    const name = "blocks." + i + ".", taps = t[name + "0.weight"], kernel = s.kernels[i];
    const after = normalization(t, name + "2.");
    return over(kernel, s.strides[i], held => {
      const sums = held[0].map((_, c) => {
        let sum = 0;
        for (let k = 0; k < kernel; k++) sum += taps[c * kernel + k] * held[k][c];
        return sum;
      });
      return after(affine(t[name + "1.weight"], t[name + "1.bias"], sums)).map(v => Math.max(v, 0));
    });
  });
  let seen = 1, apart = 1;
  s.kernels.forEach((kernel, i) => { seen += (kernel - 1) * apart; apart *= s.strides[i]; });
  const every = s.hop_ms / 10;
  return { column: frame => blocks.reduce((x, block) => x && block(x), first(frame)),
           energy: () => 0, kernel: (seen - 1) * every + 1, stride: apart * every, every };
}

const sigmoid = x => 1 / (1 + Math.exp(-x));

function recurrent(t, s, layer) {
  const h = s.hidden_size, get = name => t["gru." + name + "_l" + layer];
  let state = new Float64Array(h);
  return x => {
    const a = affine(get("weight_ih"), get("bias_ih"), x), b = affine(get("weight_hh"), get("bias_hh"), state);
    const gate = (g, i) => sigmoid(a[g * h + i] + b[g * h + i]);
    if (s.cell === "rnn") state = a.map((v, i) => Math.tanh(v + b[i]));
    else state = state.map((before, i) => {
      const fresh = Math.tanh(a[2 * h + i] + gate(0, i) * b[2 * h + i]), update = gate(1, i);
      return (1 - update) * fresh + update * before;
    });
    return state;
  };
}

function crnn(t, s) {
  const [bins, frames] = s.kernel_size, [up, along] = s.stride;
  const places = Math.floor((s.n_mels - bins) / up) + 1, kernels = t["conv.0.weight"];
  const convolve = over(frames, along, held => {
    const channels = t["conv.0.bias"].length, out = new Float64Array(channels * places);
    for (let c = 0; c < channels; c++) for (let p = 0; p < places; p++) {
      let sum = t["conv.0.bias"][c];
      for (let f = 0, i = c * bins * frames; f < bins; f++)
        for (let k = 0; k < frames; k++) sum += kernels[i++] * held[k][p * up + f];
      out[c * places + p] = sum;
    }
    if (!s.separable) return out;
    const mixed = new Float64Array(s.cnn_out_channels * places);
    return mixed.map((_, i) => t["conv.1.weight"][i / places | 0] * out[i % places] + t["conv.1.bias"][i / places | 0]);
  });
  const layers = Array.from({ length: s.gru_num_layers }, (_, i) => recurrent(t, s, i));
  const linear = (name, x) => affine(t[name + ".weight"], t[name + ".bias"], x);
  const energy = t["attention.energy.weight"] ? x => linear("attention.energy", x)[0]
    : x => linear("attention.energy.2", linear("attention.energy.0", x).map(Math.tanh))[0];
  return {
    column: frame => { const x = convolve(frame); return x && layers.reduce((v, layer) => layer(v), x); },
    energy, kernel: frames, stride: along, every: 1
  };
}

/* ---- a stream: samples in, scores out; a score is the keyword's logit minus the other ---- */

function detector(file) {
  const { about, tensors: t } = read(file), s = sizes(about), frames = logMel(s.n_mels);
  const net = s.channels ? timeNet(t, s) : crnn(t, s);
  const window = Math.floor((RATE / HOP + 1 - net.kernel) / net.stride) + 1, hop = net.every * HOP;
  let audio = new Float64Array(N_FFT), filled = N_FFT, steps = 0;  // silence before
  const outputs = [], energies = [];

  function score(output) {
    outputs.push(output);
    energies.push(net.energy(output));
    if (outputs.length > window) { outputs.shift(); energies.shift(); }
    const most = Math.max(...energies), weights = energies.map(e => Math.exp(e - most));
    const total = weights.reduce((a, b) => a + b), context = output.map((_, i) =>
      weights.reduce((sum, w, k) => sum + w * outputs[k][i], 0) / total);
    const logits = affine(t["classifier.weight"], t["classifier.bias"], context);
    return logits[1] - logits[0];
  }

  function frame(found) {
    const output = net.column(frames(audio));
    if (!output) return;
    const t = (steps++ * net.stride + net.kernel - 1) * HOP / RATE, said = score(output);
    if (t >= FIRST_S) found.push([t, said]);
  }

  return {
    about,
    /* Samples at 16 kHz, however cut -> [[seconds, score], ...] of the steps that they complete */
    feed: samples => {
      const found = [];
      for (let i = 0; i <= samples.length; i++) {
        if (filled === N_FFT) {
          frame(found);
          audio.copyWithin(0, hop);
          filled = N_FFT - hop;  // below 0: no frame reads them
        }
        if (i < samples.length) audio[filled++] = samples[i];
      }
      return found;
    }
  };
}

/* ---- from scores to events ---- */

function decision(about) {
  const d = { threshold: 0, smoothing_steps: 1, refractory_s: 1, scale: 1, offset: 0, ...about.decision };
  d.probability = score => sigmoid(d.scale * score + d.offset);
  d.at = share => (Math.log(share / (1 - share)) - d.offset) / d.scale;  // the score of a probability
  return d;
}

/* [[seconds, score], ...] -> the same with the mean of each score and those just before it */
function smoothed(scored, steps) {
  return scored.map(([t], i) => {
    const last = scored.slice(Math.max(0, i + 1 - steps), i + 1);
    return [t, last.reduce((sum, pair) => sum + pair[1], 0) / last.length];
  });
}

/* Of smoothed scores those with which an event begins. */
function events(smooth, threshold, refractory_s) {
  let silentUntil = -Infinity;
  return smooth.filter(([t, score]) => {
    const fires = score >= threshold && t >= silentUntil;
    if (fires) silentUntil = t + refractory_s;
    return fires;
  });
}

/* Chunks of any rate -> at 16 kHz, by a windowed sinc, a table for each phase; 16 crossings on each side. */
function resampler(rate) {
  if (rate === RATE) return chunk => chunk;
  const gcd = (a, b) => b ? gcd(b, a % b) : a, step = gcd(rate, RATE), up = RATE / step, down = rate / step;
  const cutoff = 0.95 * Math.min(1, RATE / rate), reach = Math.ceil(16 / cutoff), phases = {};
  const taps = phase => phases[phase] || (phases[phase] = Float64Array.from({ length: 2 * reach }, (_, i) => {
    const x = i - reach + 1 - phase / up, y = Math.PI * cutoff * x;
    const sinc = x ? Math.sin(y) / y : 1;
    return cutoff * sinc * Math.cos(Math.PI * x / 2 / (reach + 1)) ** 2;
  }));
  let held = Array.from({ length: reach - 1 }, () => 0), n = 0;  // the next lies n / up after held[reach - 1]
  return chunk => {
    for (let i = 0; i < chunk.length; i++) held.push(chunk[i]);
    const out = [];
    for (; Math.floor(n / up) + 2 * reach <= held.length; n += down) {
      const at = Math.floor(n / up), kernel = taps(n % up);
      let sum = 0;
      for (let k = 0; k < kernel.length; k++) sum += kernel[k] * held[at + k];
      out.push(sum);
    }
    const done = Math.min(Math.floor(n / up), held.length);
    held = held.slice(done);
    n -= done * up;
    return Float32Array.from(out);
  };
}

return { detector, decision, smoothed, events, resampler, rate: RATE };
})();

/* Draws a player into an element.
   given: { kws: base64 of the file, name, clips: [{ name, samples: base64, 16-bit, keywords: [[from, to], ...] }] } */
function kwsPlayer(element, given) {
  const bytes = base64 => Uint8Array.from(atob(base64), letter => letter.charCodeAt(0));
  const samplesOf = clip => Float32Array.from(new Int16Array(bytes(clip.samples).buffer), v => v / 32768);
  const SHOWN_S = 10, KEPT_S = 60, PEAK = kws.rate / 100;
  element.innerHTML = `<div class="kws-row"><label class="kws-file">Open or drop a recording
  <input type="file" accept="audio/*"></label></div>
  <canvas role="img" aria-label="Probability of the keyword over time"></canvas>
  <div class="kws-row"><label>Alarm from <input type="range" min="1" max="99"> <output></output></label>
  <label>Level <meter min="-70" max="0" value="-70"></meter></label></div>
  <p class="kws-status" role="status"></p><ol aria-label="Detections"></ol><p class="kws-cost"></p>`;
  const find = selector => element.querySelector(selector), canvas = find("canvas"), slider = find("[type=range]");
  const say = text => {  // read aloud where it is new
    if (find(".kws-status").textContent !== text) find(".kws-status").textContent = text;
  };
  const percent = share => (100 * share).toFixed(share > 0.995 && share < 1 ? 1 : 0) + " %";
  let file, detector, decision;
  try {
    file = bytes(given.kws);
    detector = kws.detector(file);
    decision = kws.decision(detector.about);
  } catch (error) { say(error.message); return; }
  const keyword = detector.about.keyword || "the keyword";
  let threshold = decision.threshold, heard, stop = () => {};

  /* ---- what was heard so far ---- */

  function begin(name, keywords, live) {
    detector = kws.detector(file);
    heard = { name, keywords, live, n: 0, first: 0, peaks: [], scored: [], smooth: [], fired: [],
              took: 0, until: null };
  }

  function hear(samples) {
    const began = performance.now();
    heard.scored = heard.scored.concat(detector.feed(samples));
    heard.took += performance.now() - began;
    let power = 0;
    for (let i = 0; i < samples.length; i++) {
      const place = ((heard.n + i) / PEAK | 0) - heard.first, loud = Math.abs(samples[i]);
      heard.peaks[place] = Math.max(heard.peaks[place] || 0, loud);
      power += loud * loud;
    }
    heard.n += samples.length;
    if (heard.live) {
      const from = heard.n / kws.rate - KEPT_S, gone = (from * kws.rate / PEAK | 0) - heard.first;
      if (gone > 100) { heard.peaks.splice(0, gone); heard.first += gone; }
      while (heard.scored.length && heard.scored[0][0] < from) heard.scored.shift();
      find("meter").value = 10 * Math.log10(power / samples.length + 1e-9);
    }
    decide();
  }

  function decide() {
    if (!heard || !heard.n) return draw();
    heard.smooth = kws.smoothed(heard.scored, decision.smoothing_steps);
    heard.fired = kws.events(heard.smooth, threshold, decision.refractory_s);
    find("ol").innerHTML = heard.fired.slice(-30).map(([t, score]) =>
      "<li>" + t.toFixed(2) + " s, " + percent(decision.probability(score)) + "</li>").join("");
    const seconds = heard.n / kws.rate, n = heard.fired.length, times = k => k + (k === 1 ? " time" : " times");
    say(heard.name + ": “" + keyword + "” was detected " + times(n) +
        (heard.live ? " in the last minute." : " in " + seconds.toFixed(1) + " s.") +
        (heard.keywords ? " It is said " + times(heard.keywords.length) + ", where it is shaded." : ""));
    const ms = heard.took / seconds;
    find(".kws-cost").textContent = (given.name ? given.name + ": " : "") + file.length.toLocaleString("en") +
      " bytes in all. A second of sound takes " + ms.toFixed(1) + " ms in this browser. Sound stays in this page.";
    draw();
  }

  /* ---- the picture ---- */

  function draw() {
    const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const pen = canvas.getContext("2d"), left = 42, right = width - 4, top = 14, bottom = height - 20;
    pen.scale(ratio, ratio);
    pen.font = "12px system-ui, sans-serif";
    const now = heard ? heard.n / kws.rate : 0, from = heard && heard.live ? Math.max(0, now - SHOWN_S) : 0;
    const span = heard && !heard.live ? now : SHOWN_S, x = t => left + (t - from) / span * (right - left);
    const y = share => bottom - share * (bottom - top);
    const line = (x0, y0, x1, y1, colour, dashes) => {
      pen.strokeStyle = colour;
      pen.setLineDash(dashes || []);
      pen.beginPath(); pen.moveTo(x0, y0); pen.lineTo(x1, y1); pen.stroke();
    };
    if (heard && heard.keywords) for (const [start, end] of heard.keywords) {
      pen.fillStyle = "#e6eedd";
      pen.fillRect(x(start), top, x(end) - x(start), bottom - top);
    }
    pen.fillStyle = "#5b6675";
    pen.textAlign = "right";
    for (const share of [0, 0.5, 1]) {
      line(left, y(share), right, y(share), "#dfe4ea");
      pen.fillText(percent(share), left - 5, y(share) + 4);
    }
    pen.textAlign = "center";
    const apart = [1, 2, 5, 10, 30, 60, 300, 600, 3600].find(s => s / span * (right - left) > 45) || 36000;
    for (let t = Math.ceil(from / apart) * apart; t <= from + span + 1e-6; t += apart)
      pen.fillText(t + " s", Math.min(x(t), right - 12), height - 5);
    if (heard) {
      pen.fillStyle = "#c3ccd6";
      const middle = (top + bottom) / 2, loudest = Math.max(0.05, heard.peaks.reduce((a, b) => Math.max(a, b), 0));
      const columns = {};
      heard.peaks.forEach((peak, i) => {
        const at = Math.round(x((heard.first + i) * PEAK / kws.rate));
        if (at >= left) columns[at] = Math.max(columns[at] || 0, peak);
      });
      for (const at in columns) {
        const high = columns[at] / loudest * (bottom - top) * 0.45;
        pen.fillRect(+at, middle - high, 1, 2 * high + 0.5);
      }
      pen.strokeStyle = "#1b6ca8";
      pen.lineWidth = 2;
      pen.beginPath();
      heard.smooth.forEach(([t, score]) => { if (t >= from) pen.lineTo(x(t), y(decision.probability(score))); });
      pen.stroke();
      pen.lineWidth = 1;
      for (const [t] of heard.fired) if (t >= from) {
        line(x(t), top, x(t), bottom, "#b3541e");
        pen.fillStyle = "#b3541e";
        pen.beginPath(); pen.moveTo(x(t), top); pen.lineTo(x(t) - 6, 2); pen.lineTo(x(t) + 6, 2); pen.fill();
      }
      if (heard.until !== null) line(x(heard.until), top, x(heard.until), bottom, "#1c2430");
    }
    const limit = decision.probability(threshold);
    line(left, y(limit), right, y(limit), "#b3541e", [5, 4]);
  }

  /* ---- where sound comes from ---- */

  function button(name, start) {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = name;
    made.setAttribute("aria-pressed", "false");
    made.addEventListener("click", () => {
      const running = made.getAttribute("aria-pressed") === "true";
      stop();
      if (running) return;
      made.setAttribute("aria-pressed", "true");
      const release = () => made.setAttribute("aria-pressed", "false");
      stop = () => { release(); stop = () => {}; };
      start(more => { stop = () => { more(); release(); stop = () => {}; }; },
            () => made.getAttribute("aria-pressed") === "true");
    });
    find(".kws-file").before(made);
  }

  /* All of a recording, some seconds at a time: the page stays awake. */
  async function score(name, samples, keywords) {
    begin(name, keywords, false);
    const mine = heard;
    for (let i = 0; i < samples.length && mine === heard; i += 5 * kws.rate) {
      hear(samples.subarray(i, i + 5 * kws.rate));
      await new Promise(resolve => setTimeout(resolve));
    }
    return mine === heard;
  }

  function play(context, samples, onStop) {
    const source = context.createBufferSource(), mine = heard;
    source.buffer = context.createBuffer(1, samples.length, kws.rate);
    source.buffer.copyToChannel(samples, 0);
    source.connect(context.destination);
    source.start();
    const began = context.currentTime;
    mine.until = 0;
    onStop(() => { mine.until = null; find("meter").value = -70; context.close(); draw(); });
    source.onended = () => { if (mine.until !== null) stop(); };
    (function follow() {
      if (mine.until === null) return;
      mine.until = context.currentTime - began;
      find("meter").value = 20 * Math.log10((mine.peaks[mine.until * 100 | 0] || 0) + 1e-4);
      draw();
      requestAnimationFrame(follow);
    })();
  }

  for (const clip of given.clips || []) {
    button("▶ " + clip.name, async (onStop, wanted) => {
      const context = new AudioContext(), samples = samplesOf(clip);  // at once: some ask for a fresh click
      if (await score(clip.name, samples, clip.keywords) && wanted()) play(context, samples, onStop);
      else context.close();
    });
  }

  const REFUSED = {
    NotAllowedError: "The microphone is not allowed here: allow it beside the address of this page, then press again.",
    NotFoundError: "There is no microphone: plug one in, or drop a recording here.",
    NotReadableError: "The microphone does not open: another program may hold it."
  };
  const TAP = "registerProcessor('kws-tap', class extends AudioWorkletProcessor { process(inputs) { " +
    "if (inputs[0].length) this.port.postMessage(inputs[0][0].slice()); return true; } });";

  async function listen(onStop) {
    if (!navigator.mediaDevices) {
      stop();
      return say("This page gets no microphone here: save it and open it as a file, or drop a recording.");
    }
    const context = new AudioContext();
    let going = true, microphone;
    const end = () => {
      if (microphone) microphone.getTracks().forEach(track => track.stop());
      if (going) context.close();
      if (going && heard && !heard.n) say("Stopped.");
      going = false;
      find("meter").value = -70;
    };
    onStop(end);
    try {
      const plain = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
      microphone = await navigator.mediaDevices.getUserMedia({ audio: plain });
      if (!going) return end();
      const source = context.createMediaStreamSource(microphone), at16k = kws.resampler(context.sampleRate);
      let waiting = [];
      begin("Microphone", null, true);
      const take = chunk => {
        if (!going) return;
        waiting.push(...at16k(chunk));
        if (waiting.length < 1280) return;
        hear(Float32Array.from(waiting));
        waiting = [];
      };
      let tap;
      try {
        await context.audioWorklet.addModule("data:text/javascript," + encodeURIComponent(TAP));
        tap = new AudioWorkletNode(context, "kws-tap");
        tap.port.onmessage = message => take(message.data);
      } catch (error) {  // no worklets here: the older way
        tap = context.createScriptProcessor(2048, 1, 1);
        tap.onaudioprocess = event => take(event.inputBuffer.getChannelData(0));
      }
      if (!going) return;
      source.connect(tap).connect(context.destination);  // hands on silence
      context.resume();
      say("Listening: say “" + keyword + "”.");
    } catch (error) {
      if (!going) return;
      stop();
      say(REFUSED[error.name] || "The microphone does not open: " + error.message);
    }
  }
  button("Microphone", listen);

  async function open(chosen) {
    stop();
    try {
      const decoder = new OfflineAudioContext(1, 1, kws.rate);
      const sound = await decoder.decodeAudioData(await chosen.arrayBuffer());
      const samples = sound.getChannelData(0).slice();
      for (let c = 1; c < sound.numberOfChannels; c++) sound.getChannelData(c).forEach((v, i) => { samples[i] += v; });
      await score(chosen.name, samples.map(v => v / sound.numberOfChannels), null);
    } catch (error) { say(chosen.name + " is not a sound that this browser can read: try a WAV, FLAC or MP3 file."); }
  }
  find("[type=file]").addEventListener("change", event => event.target.files[0] && open(event.target.files[0]));
  element.addEventListener("dragover", event => { event.preventDefault(); element.classList.add("kws-over"); });
  element.addEventListener("dragleave", () => element.classList.remove("kws-over"));
  element.addEventListener("drop", event => {
    event.preventDefault();
    element.classList.remove("kws-over");
    if (event.dataTransfer.files[0]) open(event.dataTransfer.files[0]);
  });

  function show() {
    const text = percent(decision.probability(threshold));
    find("output").textContent = text;
    slider.setAttribute("aria-valuetext", text);
  }
  slider.value = Math.round(100 * decision.probability(threshold));  // its own, until it is moved
  slider.addEventListener("input", () => {
    threshold = decision.at(slider.value / 100);
    show();
    decide();
  });
  show();
  new ResizeObserver(draw).observe(canvas);
  const first = (given.clips || [])[0];
  if (first) score(first.name, samplesOf(first), first.keywords);
  else say("Press Microphone and say “" + keyword + "”, or drop a recording here.");
}

/* Every player not drawn yet: an element with its data as JSON inside. */
kwsPlayer.all = () => document.querySelectorAll(".kws-player > script[type='application/json']").forEach(data => {
  kwsPlayer(data.parentElement, JSON.parse(data.textContent));
});
