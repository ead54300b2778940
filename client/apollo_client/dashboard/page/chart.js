// Curves over steps as plain SVG; the arrow keys and the pointer move a cursor that tells values.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 560, HEIGHT = 240, LEFT = 52, RIGHT = 22, TOP = 8, BOTTOM = 24;
// A curve has at most so many points drawn: the least and the greatest of each stretch.
const STRETCHES = 280;

export function element(name, attributes, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

/** Round numbers between two, some five of them. */
function ticks(low, high) {
  const rough = (high - low) / 4, ten = 10 ** Math.floor(Math.log10(rough));
  const step = ten * [1, 2, 5, 10].find((factor) => factor * ten >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step / 1e6; at += step) found.push(at);
  return found;
}

function powers(low, high) {
  const found = [];
  for (let at = Math.floor(Math.log10(low)); at <= Math.log10(high); at++) found.push(10 ** at);
  return found.filter((at) => at >= low).length > 1 ? found.filter((at) => at >= low) : [low, high];
}

export const short = (number) => String(Number(number.toPrecision(3)));

/** Fewer points with the same look: [x, y] pairs, by their places in the list. */
function thinned(points) {
  if (points.length <= 2 * STRETCHES) return points;
  const kept = [], long = points.length / STRETCHES;
  for (let i = 0; i < STRETCHES; i++) {
    const part = points.slice(Math.floor(i * long), Math.floor((i + 1) * long));
    const least = part.reduce((a, b) => (b[1] < a[1] ? b : a));
    const most = part.reduce((a, b) => (b[1] > a[1] ? b : a));
    kept.push(...(least[0] <= most[0] ? [least, most] : [most, least]));
  }
  return kept;
}

export class Chart {
  constructor(place, what) {
    this.what = what;
    this.svg = element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, tabindex: 0, role: "img" });
    this.told = document.createElement("p");
    this.told.className = "told";
    this.told.setAttribute("role", "status");
    place.append(this.svg, this.told);
    this.cursor = null;
    this.curves = [];
    this.svg.addEventListener("keydown", (event) => this.#key(event));
    this.svg.addEventListener("pointermove", (event) => this.#point(event));
  }

  /** Curves: [{name, style, points: [[step, value], ...]}], steps rising. */
  draw(curves, logarithmic = false) {
    const shown = (value) => Number.isFinite(value) && (!logarithmic || value > 0);
    this.curves = curves.map((curve) => ({ ...curve, points: curve.points.filter((p) => shown(p[1])) }))
      .filter((curve) => curve.points.length);
    const values = this.curves.flatMap((curve) => thinned(curve.points).map((p) => p[1]));
    const steps = this.curves.flatMap((curve) => [curve.points[0][0], curve.points.at(-1)[0]]);
    this.svg.replaceChildren();
    this.svg.setAttribute("aria-label", this.#summary());
    if (!values.length) {
      this.svg.append(element("text", { x: LEFT, y: HEIGHT / 2 }, "nothing yet"));
      return;
    }
    this.first = Math.min(...steps);
    this.last = Math.max(...steps, this.first + 1);
    const top = Math.max(...values);
    const bottom = logarithmic ? Math.min(...values) : Math.min(0, ...values);
    const high = top > bottom ? top : bottom + (Math.abs(bottom) || 1);
    const scale = logarithmic ? Math.log10 : (value) => value;
    this.x = (step) => LEFT + (WIDTH - LEFT - RIGHT) * (step - this.first) / (this.last - this.first);
    this.y = (value) => HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM)
      * (scale(value) - scale(bottom)) / (scale(high) - scale(bottom));
    this.#axes(logarithmic ? powers(bottom, high) : ticks(bottom, high));
    for (const curve of this.curves) this.#curve(curve);
    this.#showCursor();
  }

  #axes(levels) {
    for (const level of levels) {
      const y = this.y(level);
      this.svg.append(element("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y }));
      this.svg.append(element("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, short(level)));
    }
    for (const step of ticks(this.first, this.last).filter(Number.isInteger)) {
      this.svg.append(element("text", { x: this.x(step), y: HEIGHT - 6, "text-anchor": "middle" }, step));
    }
  }

  #curve({ points, style }) {
    const at = ([step, value]) => `${this.x(step).toFixed(1)} ${this.y(value).toFixed(1)}`;
    // A curve of one point is a short stroke.
    const line = points.length > 1 ? thinned(points) : [points[0], [points[0][0] + 0.2, points[0][1]]];
    this.svg.append(element("path", { class: `curve ${style}`, d: `M${line.map(at).join("L")}` }));
  }

  #summary() {
    const each = this.curves.map(({ name, points }) =>
      `${name}: ${short(points[0][1])} at step ${points[0][0]}, ${short(points.at(-1)[1])} at step ${points.at(-1)[0]}`);
    return `${this.what}. ${each.join("; ") || "Nothing yet."} Arrow keys tell each step.`;
  }

  #key(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };
    if (!(event.key in moves) || !this.curves.length) return;
    event.preventDefault();
    this.#moveTo((this.cursor ?? this.first - 1) + moves[event.key]);
  }

  #point(event) {
    if (!this.curves.length) return;
    const box = this.svg.getBoundingClientRect();
    const part = ((event.clientX - box.left) / box.width * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT);
    this.#moveTo(Math.round(this.first + part * (this.last - this.first)));
  }

  #moveTo(step) {
    this.cursor = Math.min(this.last, Math.max(this.first, step));
    this.#showCursor();
  }

  #showCursor() {
    this.svg.querySelector(".cursor")?.remove();
    if (this.cursor === null) return;
    const x = this.x(this.cursor);
    this.svg.append(element("line", { class: "cursor", x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM }));
    const values = this.curves.flatMap(({ name, points }) => {
      const point = points.find((p) => p[0] === this.cursor);
      return point ? [`${name} ${short(point[1])}`] : [];
    });
    this.told.textContent = `step ${this.cursor}: ${values.join(", ") || "no value"}`;
  }
}
