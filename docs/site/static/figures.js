// Draws what a page holds as data: plotly's figures and CircuitsVis's views, each when it comes near the window.
"use strict";

const NARROW = 560; // pixels: below, a figure keeps this width and its box scrolls

function drawPlotly(box, figure) {
  const width = Math.max(box.parentElement.clientWidth, NARROW);
  const layout = Object.assign({ template: window.plotlyTemplate }, figure.layout);
  if (!layout.width) layout.width = width;
  layout.height = layout.height || 450;
  if (layout.title && layout.title.text) layout.title = Object.assign({}, layout.title, { text: wrapped(layout.title.text, layout.width) });
  // On a touch screen a finger scrolls the page; elsewhere a rectangle zooms, and a double click goes back.
  if (matchMedia("(pointer: coarse)").matches) layout.dragmode = false;
  if (layout.width > box.clientWidth) box.tabIndex = 0; // it scrolls, for those with a keyboard too
  return Plotly.newPlot(box, figure.data, layout, { displayModeBar: false });
}

// A title has one line of about 8 pixels a character; plotly does not break it by itself.
function wrapped(title, width) {
  const most = Math.floor((width - 80) / 9);
  const lines = [""];
  for (const word of title.split(" ")) {
    const last = lines[lines.length - 1];
    if (last && last.length + word.length > most && !title.includes("<br")) lines.push(word);
    else lines[lines.length - 1] = last ? `${last} ${word}` : word;
  }
  return lines.join("<br>");
}

let views = 0;
function drawAttention(box, view) {
  const place = document.createElement("div");
  place.id = `attention-view-${++views}`;
  box.append(place);
  CircuitsVis.render(place.id, CircuitsVis[view.component], view.data);
  new MutationObserver(() => tidy(place)).observe(place, { childList: true, subtree: true });
}

// CircuitsVis leaves its controls without a name: here they get that of the words beside them. Its headings are the
// view's own and no part of the page's outline, and its pictures are told by the caption.
function tidy(place) {
  for (const picture of place.querySelectorAll("canvas")) picture.setAttribute("aria-hidden", "true");
  for (const heading of place.querySelectorAll("h1, h2, h3, h4")) heading.setAttribute("role", "presentation");
  for (const control of place.querySelectorAll("select, input")) {
    if (control.labels.length || control.hasAttribute("aria-label")) continue;
    control.setAttribute("aria-label", control.parentElement.textContent.trim().slice(0, 40) || "setting");
  }
}

function draw(box) {
  const stored = box.querySelector("script[type='application/json']");
  if (!stored) return;
  const data = JSON.parse(stored.textContent);
  stored.remove();
  if (box.parentElement.className === "plotly-figure") drawPlotly(box, data);
  else drawAttention(box, data);
}

function start() {
  const near = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        near.unobserve(entry.target);
        draw(entry.target);
      }
    },
    { rootMargin: "600px" },
  );
  for (const box of document.querySelectorAll("figure > .drawing")) near.observe(box);
}

if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
else start();
