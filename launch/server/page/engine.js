// The live view: charts of the last minutes, the ranks and the events, from /stats once a second.

import { element, make } from "./api.js";

const WINDOW_S = 300; // this much is shown
const HEIGHT = 160;
const perSecond = (name) => (now, last, seconds) => (now[name] - last[name]) / seconds;
const perStep = (name) => (now, last) => (1000 * (now[name] - last[name])) / (now.steps - last.steps);

// Each series: its label and its value from two readings of /stats and the seconds between them; NaN leaves a gap.
const CHARTS = [
  ["Tokens per second", "", { output: perSecond("output_tokens"), prompt: perSecond("prompt_tokens") }],
  ["Requests", "", { running: (now) => now.running, waiting: (now) => now.waiting }],
  ["KV cache and prefix cache", " %", {
    "KV cache in use": (now) => 100 * now.kv_usage,
    "prefix hits": (now, last) => (100 * (now.cached_tokens - last.cached_tokens)) / (now.prefix_queries - last.prefix_queries),
  }],
  ["Time of a step, at the host", " ms", {
    schedule: perStep("schedule_s"), launch: perStep("launch_s"), "wait for the device": perStep("wait_s"), commit: perStep("commit_s"),
  }],
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
const charts = CHARTS.map(([, , series]) => ({
  plot: null, // a uPlot, once the view is shown
  series: Object.values(series),
  data: Object.keys(series).map(() => []),
}));
let last = null;

const color = (name) => {
  const probe = document.body.appendChild(make("span"));
  probe.style.color = `var(${name})`;
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
};

function makePlot([, unit, series], figure, data) {
  const text = (plot, value) => (value === null || value === undefined ? "-" : `${Number(value.toPrecision(4))}${unit}`);
  const axis = { stroke: color("--muted"), grid: { stroke: color("--line"), width: 1 }, ticks: { show: false } };
  return new window.uPlot(
    {
      width: Math.max(200, figure.clientWidth - 18), height: HEIGHT,
      axes: [axis, { ...axis, size: 56 }],
      scales: { x: { time: true }, y: { range: (_, low, high) => [0, (high || 1) * 1.1] } },
      series: [{}, ...Object.keys(series).map((label, number) => (
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
  const figures = CHARTS.map(([title]) => make("figure", {}, make("figcaption", { textContent: title })));
  element("charts").replaceChildren(...figures); // all of them first: the grid sets their widths
  CHARTS.forEach((chart, index) => {
    charts[index].plot = makePlot(chart, figures[index], charts[index].data);
    showLast(charts[index].plot);
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
  extend(now, seconds);
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
