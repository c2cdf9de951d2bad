"use strict";
// Draws the figures, lets rows be hidden and shown in all curves at once, and keeps to the reader's colours and paper.

const PAPER_WIDTH = 660; // pixels of a page of A4 within its margins
const dark = matchMedia("(prefers-color-scheme: dark)");
const touch = matchMedia("(pointer: coarse)").matches;
const figures = JSON.parse(document.getElementById("figures").textContent);
const plots = figures.map(({ name }) => document.getElementById(`plot-${name}`));

function template() {
  const style = getComputedStyle(document.body);
  const [ink, quiet, line, page] = ["--ink", "--quiet", "--line", "--page"].map((name) => style.getPropertyValue(name));
  const axis = { gridcolor: line, linecolor: line, zerolinecolor: line, tickcolor: line, title: { font: { color: quiet } } };
  return {
    layout: {
      font: { family: style.getPropertyValue("font-family") || "sans-serif", size: 12, color: ink },
      paper_bgcolor: page,
      plot_bgcolor: page,
      xaxis: axis,
      yaxis: axis,
      colorscale: {
        diverging: [[0, "#c2502e"], [0.25, "#e2a184"], [0.5, page], [0.75, "#83aede"], [1, "#2a66b5"]],
        sequential: [[0, page], [0.03, mixed(page, "#2a66b5", 0.18)], [0.3, "#83aede"], [1, "#2a66b5"]],
      },
      // Of marks and lines, which must all be seen: from what recedes to what stands out.
      coloraxis2: { colorscale: [[0, mixed(page, ink, 0.3)], [0.5, "#4f8fd9"], [0.85, "#e8833a"], [1, "#d1402f"]] },
    },
  };
}

function mixed(from, to, share) {
  const [a, b] = [from, to].map((colour) => colour.trim().match(/[0-9a-f]{2}/gi).map((hex) => parseInt(hex, 16)));
  return `rgb(${a.map((value, index) => Math.round(value + share * (b[index] - value))).join(",")})`;
}

function draw() {
  // Buttons are named one by one: Plotly's own choice holds one that offers to upload the chart.
  const buttons = [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d", "toImage"]];
  const config = { responsive: true, displaylogo: false, modeBarButtons: buttons, plotlyServerURL: "" };
  figures.forEach(({ data, layout }, index) => {
    const shared = { margin: { l: 50, r: 12, t: 30, b: 44 }, hovermode: "closest", dragmode: touch ? false : "zoom" };
    const small = layout.height < 240 ? { displayModeBar: false } : {};
    Plotly.newPlot(plots[index], data, { ...shared, ...layout, template: template() }, { ...config, ...small });
  });
}

function recolour(more = {}) {
  return Promise.all(plots.map((plot) => Plotly.relayout(plot, { template: template(), ...more })));
}

function show(buttons) {
  const shown = new Set(buttons.filter((button) => button.getAttribute("aria-pressed") === "true").map((button) => button.value));
  plots.filter((plot) => plot.data.some((trace) => trace.meta)).forEach((plot) => {
    Plotly.restyle(plot, { visible: plot.data.map((trace) => shown.has(trace.meta)) });
  });
}

const buttons = [...document.querySelectorAll(".rows button[value]")];
const press = (button, on) => button.setAttribute("aria-pressed", String(on));
buttons.forEach((button) => {
  button.addEventListener("click", () => {
    press(button, button.getAttribute("aria-pressed") !== "true");
    show(buttons);
  });
  button.addEventListener("dblclick", () => {
    buttons.forEach((other) => press(other, other === button));
    show(buttons);
  });
});
document.querySelector(".rows .all")?.addEventListener("click", () => {
  const all = buttons.every((button) => button.getAttribute("aria-pressed") === "true");
  buttons.forEach((button) => press(button, !all));
  show(buttons);
});

document.querySelectorAll(".source button").forEach((button) => {
  button.addEventListener("click", () => {
    const source = button.parentElement.querySelector("pre");
    getSelection().selectAllChildren(source); // to be copied by hand where the browser does not let us
    const say = (word) => () => { button.textContent = word; };
    (navigator.clipboard?.writeText(source.textContent) ?? Promise.reject()).then(say("copied"), say("selected"));
  });
});

// On parallel axes, the line that is pointed at comes out of the crowd.
function follow(plot) {
  const before = plot.data.map(({ line, opacity }) => ({ width: line?.width, opacity }));
  const draw = (curve, width, opacity) => Plotly.restyle(plot, { "line.width": width, opacity }, [curve]);
  plot.on("plotly_hover", ({ points: [{ curveNumber: curve }] }) => draw(curve, 5, 1));
  plot.on("plotly_unhover", ({ points: [{ curveNumber: curve }] }) => draw(curve, before[curve].width, before[curve].opacity));
}

draw();
plots.filter(({ id }) => id === "plot-parallel").forEach(follow);
dark.addEventListener("change", () => recolour());
addEventListener("beforeprint", () => {
  document.documentElement.classList.add("printing");
  recolour({ width: PAPER_WIDTH });
});
addEventListener("afterprint", () => {
  document.documentElement.classList.remove("printing");
  recolour({ width: null, autosize: true });
});
