"use strict";
// Everything shown is in the page already; this picks. Numbers are never computed here.

const root = document.documentElement;
const byId = (id) => document.getElementById(id);

// ---- the slider over temperature

const slider = byId("slider");
const moving = [...document.querySelectorAll("[data-frames]")].map((part) => [
  part,
  Object.entries(JSON.parse(part.dataset.frames)),
]);

function show(index) {
  for (const [part, frames] of moving) {
    for (const [name, values] of frames) {
      if (name === "text") part.textContent = values[index];
      else part.setAttribute(name, values[index]);
    }
  }
}

slider?.addEventListener("input", () => show(slider.valueAsNumber));

// ---- dark and light

const theme = byId("theme");
const systemDark = matchMedia("(prefers-color-scheme: dark)");

function isDark() {
  return root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches;
}

function label() {
  theme.setAttribute("aria-pressed", String(isDark()));
}

theme.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  label();
});
systemDark.addEventListener("change", label);
label();

// ---- keys

const steps = [...document.querySelectorAll("section.step")];
const nav = document.querySelector("nav");
const links = new Map(
  [...nav.querySelectorAll("a")].map((link) => [link.hash.slice(1), link]),
);

function current() {
  // Where the focus is if that can be seen; the last steps may not reach the line.
  const focused = document.activeElement.closest("section.step");
  const box = focused?.getBoundingClientRect();
  if (box && box.top < innerHeight && box.bottom > 0) return steps.indexOf(focused);
  const line = innerHeight / 3;
  return steps.findLastIndex((step) => step.getBoundingClientRect().top < line);
}

function goTo(index) {
  const step = steps[Math.max(0, Math.min(index, steps.length - 1))];
  step.scrollIntoView();
  step.querySelector("h2").focus({ preventScroll: true });
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !byId("keys").checked) return;
  if (event.key === "n" || event.key === "j") goTo(current() + 1);
  else if (event.key === "p" || event.key === "k") goTo(current() - 1);
  else if (event.key === "b") steps[current()]?.querySelector(".break")?.click();
  else return;
  event.preventDefault();
});

// ---- where the reader is

let waiting = false;

function mark() {
  waiting = false;
  const here = links.get(steps[current()]?.id);
  for (const link of links.values()) {
    if (link === here) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
  // Beside the steps the contents scroll by themselves; above them they do not.
  if (here && nav.scrollHeight > nav.clientHeight) {
    nav.scrollTop = here.offsetTop - nav.clientHeight / 2;
  }
}

addEventListener("scroll", () => {
  if (!waiting) requestAnimationFrame(mark);
  waiting = true;
});
mark();

// ---- small screens and paper

if (matchMedia("(max-width: 70rem)").matches) nav.querySelector("details").open = false;

function reachable() {
  // What scrolls sideways has to be reachable without a mouse.
  for (const box of document.querySelectorAll(".formula, .wide")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}

reachable();
addEventListener("resize", reachable);
addEventListener("beforeprint", () => {
  for (const box of document.querySelectorAll("main details:not([open])")) {
    box.open = true;
    box.dataset.printed = "";
  }
});
addEventListener("afterprint", () => {
  for (const box of document.querySelectorAll("details[data-printed]")) {
    box.open = false;
    delete box.dataset.printed;
  }
});
