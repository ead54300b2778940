// Keeps what the server sends about runs, and shows it.

import { Chart } from "./chart.js";
import { runRow, seconds, showEngine, showProbes, showSnapshots, word } from "./tables.js";

const STYLES = 6;
// Of a run that goes on for days; older points are left out.
const POINTS = 20000;

const runs = new Map();
const loss = new Chart(document.getElementById("loss"), "Loss of each run, by step");
const pause = new Chart(document.getElementById("pause"), "Milliseconds that vLLM was paused for each step");
const logarithmic = document.getElementById("logarithmic");
const connection = document.getElementById("connection");
// The run at work is the chosen one until somebody picks another.
let chosen = null, picked = false, waiting = false, styled = 0;

function draw() {
  waiting = false;
  const shown = [...runs.values()].filter((run) => run.curve);
  const curves = (value) => shown.map((run) => ({
    name: run.label,
    style: run.style,
    points: run.points.map((point) => [point.step, value(point)]),
  }));
  loss.draw(curves((point) => point.loss), logarithmic.checked);
  pause.draw(curves((point) => point.pause * 1e3));
  for (const run of runs.values()) run.shown.update(run === chosen);
  showProbes(chosen);
}

/** At the screen's next frame, once for all that came by then. */
function drawSoon() {
  if (!waiting) requestAnimationFrame(draw);
  waiting = true;
}

function pick(run) {
  chosen = run;
  picked = true;
  drawSoon();
}

function known(id, name) {
  if (runs.has(id)) return runs.get(id);
  const label = name ? `${id.slice(0, 8)} ${name}` : id.slice(0, 8);
  const run = { id, label, points: [], probes: {}, notes: [], paused: 0, curve: true, style: `s${styled++ % STYLES}` };
  run.shown = runRow(run, run.style, (wanted) => { run.curve = wanted; drawSoon(); }, () => pick(run));
  runs.set(id, run);
  document.getElementById("runs").prepend(run.shown.row);
  return run;
}

const kinds = {
  begin() {
    for (const run of runs.values()) run.shown.row.remove();
    runs.clear();
    styled = 0;
    chosen = null;
    picked = false;
  },
  run(told) {
    const run = known(told.run_id, told.name);
    run.state = word(told.state, "RUN_STATE_");
    run.total = told.steps_total ?? run.total;
    run.began = told.start_time ?? told.create_time;
    run.failure = told.failure;
  },
  event(told) {
    const run = known(told.run_id, "");
    if (!picked) chosen = run;
    if (told.step) {
      const { step, loss, pause_time } = told.step;
      run.points.push({ step: Number(step), loss: Number(loss ?? 0), pause: seconds(pause_time) });
      if (run.points.length > POINTS) run.points.splice(0, POINTS / 10);
      run.paused += seconds(pause_time);
    } else if (told.probed) {
      run.probes[told.probed.after_training ? "after" : "before"] = told.probed.results;
    } else if (told.started) {
      run.total = told.started.steps_total;
    } else if (told.finished) {
      run.paused = seconds(told.finished.pause_time);
      for (const notice of [told.finished.failure, told.finished.stopped]) if (notice) run.notes.push(notice.message);
    } else if (told.warning) {
      run.notes.push(told.warning.message);
    }
  },
  status: showEngine,
  snapshots: showSnapshots,
  beat() {},
  trouble(told) {
    connection.textContent = told.message;
    connection.className = "bad";
  },
};

const source = new EventSource("events");
for (const [kind, take] of Object.entries(kinds)) {
  source.addEventListener(kind, (message) => {
    if (kind !== "trouble") {
      connection.textContent = "live";
      connection.className = "";
    }
    take(JSON.parse(message.data));
    drawSoon();
  });
}
source.addEventListener("error", () => {
  if (connection.className !== "bad") connection.textContent = "'apollo dashboard' does not answer; trying again";
  connection.className = "bad";
});
logarithmic.addEventListener("change", drawSoon);
draw();
