"use strict";

/* The figure of the first page, alive: one observation x = 2 of p(z) = N(0, 1), p(x | z) = N(z, 1), whose posterior is
   N(1, 1/2); q walks from the prior (t = 0) to it (t = 1) and beyond. Each dot is the gradient of one draw of the ELBO
   with respect to the mean of q; the same sixty draws of noise serve both rows and every t. */
const DRAWS = Array.from({length: 60}, (_, i) => normalQuantile((i + 0.5) / 60));

function normalQuantile(p) {
  let low = -6, high = 6;
  for (let i = 0; i < 50; i++) {
    const middle = (low + high) / 2;
    if (normalCdf(middle) < p) low = middle;
    else high = middle;
  }
  return low;
}

function normalCdf(z) {
  let sum = z, term = z;
  for (let i = 1; i < 120; i++) {
    term *= (z * z) / (2 * i + 1);
    sum += term;
  }
  return 0.5 + (sum * Math.exp((-z * z) / 2)) / Math.sqrt(2 * Math.PI);
}

function gradients(t) {
  const mean = t, std = Math.SQRT1_2 ** t;
  const total = DRAWS.map((eps) => -2 * (mean + std * eps - 1));
  const path = DRAWS.map((eps, i) => total[i] + eps / std);
  return {total, path};
}

function spread(values) {
  const mean = values.reduce((a, b) => a + b) / values.length;
  return Math.sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / values.length);
}

function draw(figure, t) {
  const found = gradients(t);
  for (const [name, values] of Object.entries(found)) {
    const row = figure.querySelector(`[data-row=${name}]`);
    const dots = row.querySelectorAll("circle");
    values.forEach((value, i) => dots[i].setAttribute("cx", 300 + Math.max(-290, Math.min(290, 42 * value))));
    row.querySelector("text.spread").textContent = `standard deviation ${spread(values).toFixed(2)}`;
  }
  const where = Math.abs(t - 1) < 0.005 ? "q is the exact posterior" : t < 1 ? "q is wider than the posterior" : "q is narrower";
  figure.querySelector("output").textContent = `t = ${t.toFixed(2)}: ${where}`;
}

function row(name, label, top) {
  const dots = DRAWS.map((_, i) => `<circle cy="${top + 26 + ((i * 7) % 21)}" r="3.5"/>`).join("");
  return `<g data-row="${name}"><text x="10" y="${top + 12}">${label}</text>
    <text class="spread" x="590" y="${top + 12}" text-anchor="end"></text>
    <line x1="300" x2="300" y1="${top + 20}" y2="${top + 52}"/>${dots}</g>`;
}

for (const figure of document.querySelectorAll("[data-live=walk]")) {
  figure.innerHTML = `<svg viewBox="0 0 600 128" role="img" aria-label="Gradients of sixty draws, written in two ways">
    ${row("total", "with the score: the usual gradient", 0)}${row("path", "without it: the path gradient", 66)}</svg>
    <label>Walk q from the prior to the posterior, and beyond
    <input type="range" min="0" max="1.5" step="0.01" value="0.3"></label><output></output>`;
  const slider = figure.querySelector("input");
  slider.addEventListener("input", () => draw(figure, Number(slider.value)));
  draw(figure, Number(slider.value));
}
