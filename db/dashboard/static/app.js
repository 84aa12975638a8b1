"use strict";
// Draws the charts and follows a run; everything else works without it.
(function () {
  const colour = (word) => getComputedStyle(document.documentElement).getPropertyValue("--" + word).trim();
  const plots = new Map();

  function draw(place) {
    const chart = JSON.parse(place.dataset.chart);
    if (plots.has(place)) plots.get(place).destroy();
    // Each bar stands on those of the series before, so the highest is drawn first.
    const sums = new Array(chart.x.length).fill(0);
    const stacked = chart.series.map((series) => series.values.map((value, at) => (sums[at] += value)));
    const series = chart.series.map((one, at) => ({
      label: one.label,
      fill: colour(one.label),
      stroke: colour(one.label),
      width: 0,
      points: { show: false },
      paths: uPlot.paths.bars({ size: [0.8, 40], align: 1 }),
      data: stacked[at],
    }));
    series.reverse();
    const axis = { stroke: colour("muted"), grid: { stroke: colour("line"), width: 1 }, ticks: { show: false } };
    const from = chart.from === null ? chart.x[0] : chart.from;
    const options = {
      width: place.clientWidth,
      height: 240,
      tzDate: (at) => uPlot.tzDate(new Date(at * 1e3), "UTC"),
      cursor: { show: false },
      legend: { show: false },
      scales: { x: { time: true, range: [from, Math.max(Math.ceil(chart.to / chart.step) * chart.step, from + chart.step)] }, y: { range: (_, low, high) => [0, Math.max(1, high * 1.05)] } },
      axes: [axis, Object.assign({ size: 56, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6] }, axis)],
      series: [{}].concat(series.map(({ data, ...rest }) => rest)),
    };
    plots.set(place, new uPlot(options, [chart.x].concat(series.map((one) => one.data)), place));
  }

  function drawAll() {
    for (const place of plots.keys()) if (!place.isConnected) { plots.get(place).destroy(); plots.delete(place); }
    document.querySelectorAll("[data-chart]").forEach(draw);
  }

  function follow() {
    const place = document.querySelector("[data-events]");
    if (!place) return;
    const source = new EventSource(place.dataset.events);
    let first = true;
    source.onmessage = (event) => {
      const ended = JSON.parse(event.data).ended;
      if (ended) source.close();
      // The first event says what the page shows already.
      if (!first || ended) htmx.ajax("GET", place.dataset.page, { target: "#live", select: "#live", swap: "outerHTML" });
      first = false;
    };
    addEventListener("pagehide", () => source.close());
  }

  function start() {
    document.documentElement.classList.add("js");
    drawAll();
    follow();
    document.body.addEventListener("htmx:afterSettle", drawAll);
    // An empty filter needs no place in the address.
    document.body.addEventListener("htmx:configRequest", (event) => {
      const given = event.detail.parameters;
      for (const name of Object.keys(given)) if (given[name] === "") delete given[name];
    });
    let waiting;
    addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(drawAll, 150); });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  }
  start();
})();
