// The live view: charts of the last minutes, the ranks and the events, from /stats once a second.

import { element, make } from "./api.js";

const WINDOW_S = 300; // this much is shown
const HEIGHT = 160;
const perSecond = (name) => (now, last, seconds) => (now[name] - last[name]) / seconds;
const perStep = (...names) => (now, last) => {
  const [first, ...others] = names.map((name) => now[name] - last[name]);
  return (1000 * others.reduce((rest, part) => rest - part, first)) / (now.steps - last.steps);
};
const ON_CPU = {
  "GEMMs and the rest": perStep("launch_s", "attention_s", "collective_s"),
  attention: perStep("attention_s"), communication: perStep("collective_s"),
  host: (now, last) => perStep("schedule_s")(now, last) + perStep("commit_s")(now, last),
};
const ON_GPU = { "wait for the GPU": perStep("wait_s"), launch: perStep("launch_s"), schedule: perStep("schedule_s"), commit: perStep("commit_s") };
const GPU_NOTE = "The host does not see the kernels of a GPU; lockstep bench throughput --profile traces them.";

// Each series: its label and its value from two readings of /stats and the seconds between them; NaN leaves a gap.
const chartsOf = (onGpu) => [
  ["Tokens per second", "", { output: perSecond("output_tokens"), prompt: perSecond("prompt_tokens") }],
  ["Requests", "", { running: (now) => now.running, waiting: (now) => now.waiting }],
  ["KV cache and prefix cache", " %", {
    "KV cache in use": (now) => 100 * now.kv_usage,
    "prefix hits": (now, last) => (100 * (now.cached_tokens - last.cached_tokens)) / (now.prefix_queries - last.prefix_queries),
  }],
  ["Time of a step on rank 0", " ms", onGpu ? ON_GPU : ON_CPU, onGpu ? GPU_NOTE : ""],
];
const FIGURES = {
  running: (now) => now.running,
  waiting: (now) => now.waiting,
  "KV cache in use": (now) => `${(100 * now.kv_usage).toFixed(1)} %`,
  "prefix cache hits, tokens": (now) => now.cached_tokens,
  "output tokens/s": (now, last, seconds) => (last ? perSecond("output_tokens")(now, last, seconds).toFixed(0) : "0"),
  "prompt tokens/s": (now, last, seconds) => (last ? perSecond("prompt_tokens")(now, last, seconds).toFixed(0) : "0"),
  "ms a step": (now, last, seconds) =>
    last && now.steps > last.steps ? ((1000 * seconds) / (now.steps - last.steps)).toFixed(2) : "idle",
  preemptions: (now) => now.preemptions,
  restarts: (now) => now.restarts,
};

const times = [];
let charts = []; // made with the first reading, which has the devices of the ranks
let last = null;

function makeCharts(ranks) {
  charts = chartsOf(ranks.some((rank) => rank.device.startsWith("GPU"))).map(([title, unit, series, note]) => ({
    title, unit, note, labels: Object.keys(series), series: Object.values(series),
    data: Object.keys(series).map(() => []),
    plot: null, // a uPlot, once the view is shown
  }));
  drawCharts();
}

const color = (name) => {
  const probe = document.body.appendChild(make("span"));
  probe.style.color = `var(${name})`;
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
};

function makePlot({ unit, labels, data }, figure) {
  const text = (plot, value) => (value === null || value === undefined ? "-" : `${Number(value.toPrecision(4))}${unit}`);
  const axis = { stroke: color("--muted"), grid: { stroke: color("--line"), width: 1 }, ticks: { show: false } };
  return new window.uPlot(
    {
      width: Math.max(200, figure.clientWidth - 18), height: HEIGHT,
      axes: [axis, { ...axis, size: 56 }],
      scales: { x: { time: true }, y: { range: (_, low, high) => [0, (high || 1) * 1.1] } },
      series: [{}, ...labels.map((label, number) => (
        { label, stroke: color(`--series-${number + 1}`), width: 2, spanGaps: false, points: { show: false }, value: text }
      ))],
    },
    [times, ...data],
    figure,
  );
}

// The legend shows the last values unless the mouse is over a chart.
function showLast(plot) {
  if (plot.cursor.left < 0) plot.setLegend({ idx: times.length - 1 });
}

// Draws all charts anew: the first time, and when the theme or the width has changed.
export function drawCharts() {
  if (element("engine").hidden) return;
  const figures = charts.map(({ title, note }) =>
    make("figure", {}, make("figcaption", { textContent: title }), ...(note ? [make("small", { textContent: note })] : [])));
  element("charts").replaceChildren(...figures); // all of them first: the grid sets their widths
  charts.forEach((chart, index) => {
    chart.plot = makePlot(chart, figures[index]);
    showLast(chart.plot);
  });
}

function extend(now, seconds) {
  times.push(Date.now() / 1000);
  for (const { series, data } of charts)
    series.forEach((value, index) => {
      const number = last ? value(now, last, seconds) : null;
      data[index].push(Number.isFinite(number) ? number : null);
    });
  while (times[0] < times.at(-1) - WINDOW_S) {
    times.shift();
    for (const { data } of charts) data.forEach((values) => values.shift());
  }
  if (element("engine").hidden) return;
  for (const { plot, data } of charts) {
    plot.setData([times, ...data]);
    showLast(plot);
  }
}

function showRanks(ranks) {
  const head = make("tr", {}, ...["rank", "host", "pid", "device", "weights", "KV cache", "state"].map((name) => make("th", { textContent: name })));
  const gib = (bytes) => (bytes ? `${(bytes / 2 ** 30).toFixed(2)} GiB` : "-");
  const rows = ranks.map((r) =>
    [r.rank, r.host, r.pid, r.device || "-", gib(r.weight_bytes), gib(r.kv_cache_bytes), r.state].map((textContent) => make("td", { textContent })));
  element("ranks").replaceChildren(head, ...rows.map((cells) => make("tr", {}, ...cells)));
}

function showEvents(incidents) {
  const clock = (seconds) => new Date(1000 * seconds).toLocaleTimeString();
  const entries = incidents.map(({ at, event }) => make("li", {}, make("time", { textContent: clock(at) }), event));
  element("events").replaceChildren(...(entries.length ? entries.reverse() : [make("li", { textContent: "none since the start" })]));
}

// Shows a reading of /stats.
export function showStats(stats) {
  const now = { ...stats, at: performance.now() };
  const seconds = last ? (now.at - last.at) / 1000 : 0;
  if (!charts.length && stats.ranks.length) makeCharts(stats.ranks);
  if (charts.length) extend(now, seconds);
  element("figures").replaceChildren(...Object.entries(FIGURES).map(([name, value]) =>
    make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value(now, last, seconds) }))));
  showRanks(stats.ranks);
  showEvents(stats.events);
  last = now;
}

// A reading was missed: the next rates start anew.
export function forgetLast() {
  last = null;
}
