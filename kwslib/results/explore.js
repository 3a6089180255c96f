/* One plot of quality against cost with a choice of axes: what page.explored gives, as SVG, without a network. */
const kwsExplore = (() => {
"use strict";

const LOOKS = {  // precision -> colour and shape, as plots.LOOKS
  "float32": ["#0072b2", "o"], "float16": ["#c98a00", "s"], "int8": ["#009e73", "D"],
  "weight-int8": ["#a8508a", "^"], "weight-int4": ["#d55e00", "v"],
  "weight-int8-act8": ["#3f97cf", ">"], "weight-int4-act8": ["#333333", "<"]
};
const SHAPES = {
  o: "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0", s: "M-4.5-4.5h9v9h-9z", D: "M0-6l6 6-6 6-6-6z", "^": "M0-6l6 11h-12z",
  v: "M0 6l6-11h-12z", ">": "M6 0l-11 6v-12z", "<": "M-6 0l11 6v-12z"
};
const known = value => value !== null && value !== undefined;

function rows(data) {
  return data.rows.map(values => Object.fromEntries(data.columns.map((column, i) => [column, values[i]])));
}

/* Names that no other one beats in both, cheapest first, as records.pareto. */
function pareto(points, x, y) {
  let best = Infinity;
  const ahead = row => row[y] < best && ((best = row[y]), true);
  return points.slice().sort((a, b) => a[x] - b[x] || a[y] - b[y]).filter(ahead).map(row => row.name);
}

/* Those with both and one of the techniques, of one report if it is named, as notes do. Models with a decision for
   streams are judged on streams alone. */
function shown(all, techniques, x, y, report = "") {
  const clips = all.filter(row => !known(row.stream_miss)), judged = y === "au_fa_fr" && clips.length ? clips : all;
  return judged.filter(row => known(row[y]) && row[x] > 0 && techniques.includes(row.technique) &&
    (!report || new RegExp("reports? " + report).test(row.note)));
}

/* Whether every word that is searched for stands somewhere in what is said of an experiment. */
function matches(row, text) {
  const said = [row.name, row.note, row.technique, row.precision].join(" ").toLowerCase();
  return text.toLowerCase().split(/\s+/).every(word => said.includes(word));
}

/* Marks of a log axis: 1, 2 and 5 of each ten, or fewer where there are many tens. */
function ticks(low, high) {
  const found = [], tens = Math.log10(high / low);
  for (let ten = Math.floor(Math.log10(low)); ten <= Math.log10(high); ten++)
    for (const digit of tens > 4 ? [1] : tens > 2 ? [1, 3] : [1, 2, 5]) found.push(+(digit + "e" + ten));
  return found.filter(value => value >= low && value <= high);
}

const number = value => Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : "" + +value.toPrecision(3);

/* What is known of an experiment, as pairs of a label and a text. */
function facts(row, data) {
  const of = (value, unit, low, high) => known(value) ? number(value * unit) +
    (known(low) ? " (" + number(low * unit) + " to " + number(high * unit) + ")" : "") : "";
  const said = data.y.map(([key, label, unit, low, high]) => [label, of(row[key], unit, row[low], row[high])]);
  const verdict = row.gain_low > 0 ? ", better" : row.gain_high < 0 ? ", worse" : ", no clear difference";
  if (known(row.gain) && !known(row.stream_miss)) said.push(["AU-FA-FR gained over " + row.control + ", ×1e-5",
    of(row.gain, 1e5, row.gain_low, row.gain_high) + verdict]);
  for (const [key, label, unit] of data.x) said.push([label, of(row[key], unit)]);
  return said.filter(([, text]) => text);
}

/* A straight line from one end to the other, of values on a log axis. */
const scale = (from, to, start, end) => value => start + Math.log(value / from) / Math.log(to / from) * (end - start);

/* A learning curve as SVG: the mean of the seeds in their range, by epoch. A 0 stands at a hundredth. */
function learning([epochs, ...curves]) {
  const [low, mean, high] = curves.map(values => values.map(value => Math.max(value, 0.01)));
  const ends = [Math.min(...low) / 1.2, Math.max(...high) * 1.2], last = epochs[epochs.length - 1];
  const px = epoch => 40 + 310 * (last > 1 ? (epoch - 1) / (last - 1) : 0.5), py = scale(...ends, 140, 20);
  const points = values => values.map((value, i) => px(epochs[i]).toFixed(1) + " " + py(value).toFixed(1));
  const write = (x, y, words, anchor) => `<text x="${x}" y="${y}" text-anchor="${anchor}" fill="#4a5563">${words}</text>`;
  return `<svg class="learned" viewBox="0 0 360 178" role="img" aria-label="Learning curve: val AU-FA-FR, times 1e-5, of
    ${number(mean[0])} after the first epoch and ${number(mean[mean.length - 1])} after ${last}">` +
    ticks(...ends).map(value => `<path d="M40 ${py(value)}H350" stroke="#e6eaef"/>` +
      write(34, py(value) + 4, number(value), "end")).join("") +
    `<path d="M${points(low).concat(points(high).reverse()).join("L")}Z" fill="#0072b2" opacity=".2"/>
    <path d="M${points(mean).join("L")}" fill="none" stroke="#0072b2" stroke-width="2"/>` +
    [...new Set([1, Math.ceil(last / 2), last])].map(epoch => write(px(epoch), 156, epoch, "middle")).join("") +
    write(195, 174, "epoch", "middle") + write(0, 12, "val AU-FA-FR, ×1e-5: mean and range of the seeds", "start") + "</svg>";
}

/* Draws into the element of the page that has controls, an svg, places for a hint and for an experiment. */
function draw(element, data) {
  const all = rows(data), byName = Object.fromEntries(all.map(row => [row.name, row]));
  const clean = text => String(text).replace(/[&<>"]/g, letter => "&#" + letter.charCodeAt(0) + ";");
  const find = selector => element.querySelector(selector);
  const svg = find("svg"), tip = find(".tip"), panel = find(".panel");
  const points = () => [...svg.querySelectorAll("g")];
  let current = "baseline", places, painted;

  function paint() {
    painted = find(".plot").clientWidth;
    const axis = name => data[name].find(([key]) => key === find(`[name=${name}]`).value);
    const [y, ySaid, yUnit, low, high] = axis("y"), [x, xSaid, xUnit] = axis("x"), text = find("[type=search]").value;
    const techniques = [...element.querySelectorAll(":checked[type=checkbox]")].map(box => box.value);
    const drawn = shown(all, techniques, x, y, find("[name=report]").value).sort((a, b) => a[x] - b[x]);
    const width = Math.max(280, painted), height = width < 500 ? 380 : 470;
    const left = 48, right = width - 12, top = 18, bottom = height - 42;
    const bars = [["the reports' bar", data.bar, "7 4"], ["baseline", (byName.baseline || {})[y], "2 3"]]
      .filter(([, value], i) => known(value) && (i || y === "au_fa_fr"));
    const heights = [...drawn.map(row => row[y]), ...bars.map(bar => bar[1])].filter(value => value > 0);
    const zeros = drawn.some(row => row[y] <= 0), least = Math.min(...heights), floor = zeros ? least / 2 : least;
    const costs = drawn.map(row => row[x]), xEnds = [Math.min(...costs) / 1.25, Math.max(...costs) * 1.25];
    const yEnds = [floor / 1.3, Math.max(...heights) * 1.3];
    const px = scale(...xEnds, left, right), within = scale(...yEnds, bottom, top);
    const py = value => Math.max(top, value <= 0 ? within(floor) : Math.min(bottom, within(value)));
    const write = (at, down, words, anchor, colour) =>
      `<text x="${at}" y="${down}" text-anchor="${anchor}" fill="${colour || "#4a5563"}">${clean(words)}</text>`;
    const line = (d, colour, extra) => `<path d="${d}" fill="none" stroke="${colour}" ${extra || ""}/>`;
    let inside = write((left + right) / 2, height - 6, xSaid, "middle") + write(0, 11, ySaid, "start");
    places = {};
    if (drawn.length) {
      for (const value of ticks(...xEnds.map(end => end * xUnit))) {
        const at = px(value / xUnit), [unit, of] = value < 1e4 ? ["", 1] : value < 1e6 ? ["k", 1e3] : ["M", 1e6];
        inside += line(`M${at} ${top}V${bottom}`, "#e6eaef") + write(at, bottom + 16, number(value / of) + unit, "middle");
      }
      for (const value of ticks((zeros ? least : yEnds[0]) * yUnit, yEnds[1] * yUnit)) {
        const at = within(value / yUnit);
        inside += line(`M${left} ${at}H${right}`, "#e6eaef") + write(left - 6, at + 4, number(value), "end");
      }
      if (zeros) inside += write(left - 6, py(0) + 4, "0", "end");
      for (const [words, value, dashes] of bars) inside += write(right, py(value) - 5, words, "end", "#8c2323") +
        line(`M${left} ${py(value)}H${right}`, "#b03030", `stroke-dasharray="${dashes}"`);
      const front = pareto(drawn, x, y).map(name => px(byName[name][x]) + " " + py(byName[name][y]));
      inside += line("M" + front.join("L"), "#6b7685", 'stroke-width="1.5"');
      if (!drawn.some(row => row.name === current)) current = drawn[0].name;
      for (const row of drawn) {
        const [at, down] = places[row.name] = [px(row[x]), py(row[y])];
        const [colour, shape] = LOOKS[row.precision] || ["#777", "o"];
        const said = [row.name, row.precision, ...facts(row, data).map(pair => pair.join(": "))].join("; ");
        inside += `<g role="button" data-name="${row.name}" tabindex="${row.name === current ? 0 : -1}"
          transform="translate(${at} ${down})" aria-label="${clean(said)}" class="${matches(row, text) ? "" : "dim"}">
          ${known(row[low]) ? line(`M0 ${py(row[low]) - down}V${py(row[high]) - down}`, colour, 'opacity=".3"') : ""}
          <circle r="10" opacity="0"/><path class="mark" d="${SHAPES[shape]}" fill="${colour}"/>
          ${row[y] <= 0 ? line("M-4 9l4 5 4-5", "#1c2430") : ""}</g>`;
      }
    }
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.innerHTML = inside;
    find(".legend").innerHTML = Object.entries(LOOKS).map(([precision, [colour, shape]]) =>
      drawn.some(row => row.precision === precision) ? `<span><svg viewBox="-8 -8 16 16" aria-hidden="true"><path
      d="${SHAPES[shape]}" fill="${colour}"/></svg>${precision}</span>` : "").join("") +
      "<span>grey line: Pareto front of what is shown</span>" + (zeros ? "<span>⌄ is a 0</span>" : "");
    find("[role=status]").textContent = `${drawn.length} of ${all.length} experiments are shown` +
      (text.trim() ? `; ${drawn.filter(row => matches(row, text)).length} match.` : ".");
    tip.hidden = true;
  }

  function hint(name) {
    const [at, down] = places[name];
    tip.innerHTML = `<b>${name}</b> ${clean(byName[name].note)}<br>` +
      facts(byName[name], data).map(pair => clean(pair.join(": "))).join("<br>");
    tip.hidden = false;
    const below = down + 18 + tip.offsetHeight < svg.clientHeight;
    tip.style.left = Math.max(0, Math.min(at + 14, painted - tip.offsetWidth)) + "px";
    tip.style.top = (below ? down + 18 : Math.max(0, down - 18 - tip.offsetHeight)) + "px";
  }

  function open(row) {
    const link = (to, said) => `<a href="${encodeURI(to)}">${clean(said)}</a>`;
    const control = byName[row.control] ? ", compared with " + link("#experiment-" + row.control, row.control) : "";
    panel.innerHTML = `<button type="button" aria-label="Close">×</button><h3>${row.name}</h3>
      <p>${clean(row.note)}${row.note ? "; " : ""}${row.technique}, ${clean(row.precision)}${control}.</p>
      <dl>${facts(row, data).map(([label, text]) => `<div><dt>${clean(label)}</dt><dd>${clean(text)}</dd></div>`).join("")}</dl>
      ${row.learned ? learning(row.learned) : ""}<ul>${row.files.map(file => {
        const [, label, seed] = file.match(/(.*-seed(.*))\./);
        return `<li>seed ${seed}: ${link(`${data.records}${label}.json`, "record")}${
          data.home ? ", " + link(data.home + file, file) : ""}</li>`;
      }).join("")}</ul>`;
    panel.hidden = false;
    panel.focus({ preventScroll: true });
    panel.scrollIntoView({ block: "nearest" });
    panel.querySelector("button").onclick = () => {
      panel.hidden = true;
      location.hash = "explore";
      const point = points().find(g => g.dataset.name === current);
      if (point) point.focus();
    };
  }
  const asked = () => all.find(row => "#experiment-" + encodeURI(row.name) === location.hash);
  const follow = () => { if (asked()) open(asked()); };
  const go = name => { if (asked() === byName[name]) follow(); else location.hash = "experiment-" + name; };

  const on = (kind, act) => svg.addEventListener(kind, event => {
    const point = event.target.closest("g[data-name]");
    if (point) act(point.dataset.name, event);
  });
  on("mouseover", hint);
  on("focusin", hint);
  for (const kind of ["mouseleave", "focusout"]) svg.addEventListener(kind, () => { tip.hidden = true; });
  on("click", name => { current = name; tip.hidden = true; go(name); });
  on("keydown", (name, event) => {
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key], groups = points();
    const next = step && groups[groups.findIndex(g => g.dataset.name === name) + step];
    if (event.key === "Escape") tip.hidden = true;
    else if (event.key === "Enter" || event.key === " ") go(name);
    else if (!step) return;
    event.preventDefault();
    if (!next) return;
    groups.forEach(g => g.setAttribute("tabindex", g === next ? 0 : -1));
    current = next.dataset.name;
    next.focus();
  });
  element.addEventListener("input", paint);
  addEventListener("hashchange", follow);
  new ResizeObserver(() => { if (find(".plot").clientWidth !== painted) paint(); }).observe(element);
  document.querySelectorAll("td:first-child").forEach(cell => {
    const name = cell.textContent;
    if (Object.hasOwn(byName, name)) cell.innerHTML = `<a href="#experiment-${name}">${name}</a>`;
  });
  paint();
  follow();
}

/* Draws into the explorer of this page, which is hidden where nothing can draw. */
function start() {
  const element = document.getElementById("explore");
  element.hidden = false;
  draw(element, JSON.parse(document.getElementById("explored").textContent));
}

return { rows, pareto, shown, matches, ticks, facts, learning, draw, start, LOOKS };
})();
