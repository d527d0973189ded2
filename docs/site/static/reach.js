// What scrolls can be reached with the keyboard, and what moves can be stopped.
"use strict";

const BOXES = "pre, .table-wrapper, .output, .drawing, .math, mjx-container, .sig";

function reachable() {
  for (const box of document.querySelectorAll(BOXES)) {
    if (box.scrollWidth > box.clientWidth + 1 && getComputedStyle(box).overflowX !== "visible") box.tabIndex = 0;
  }
}

function stoppable() {
  const picture = document.getElementById("birth");
  const button = document.getElementById("birth-button");
  if (!picture || !button) return;
  const stop = (still) => {
    if (still) picture.pauseAnimations();
    else picture.unpauseAnimations();
    button.textContent = still ? "Play" : "Pause";
  };
  button.hidden = false;
  button.addEventListener("click", () => stop(!picture.animationsPaused()));
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) {
    picture.setCurrentTime(Number(picture.dataset.end));
    stop(true);
  }
}

addEventListener("load", () => new ResizeObserver(reachable).observe(document.body)); // figures and folds change it
document.addEventListener("DOMContentLoaded", stoppable);
