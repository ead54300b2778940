// What the page says in words: engine, runs, probes, snapshots.

import { element, short } from "./chart.js";

const GIB = 2 ** 30, MIB = 2 ** 20;

/** An enum's value as a word: `running`. */
export const word = (value, prefix) => (value ?? "").replace(prefix, "").toLowerCase().replaceAll("_", " ");

export const seconds = (duration) => Number.parseFloat(duration ?? "0");

function size(bytes) {
  const count = Number(bytes ?? 0);
  return count >= GIB ? `${(count / GIB).toFixed(1)} GiB` : `${(count / MIB).toFixed(1)} MiB`;
}

const moment = (time) => (time ? new Date(time).toLocaleString() : "");

export function cell(text, style = "") {
  const made = document.createElement("td");
  made.textContent = text;
  made.className = style;
  return made;
}

function row(...cells) {
  const made = document.createElement("tr");
  made.append(...cells);
  return made;
}

function none(columns, text) {
  const made = cell(text);
  made.colSpan = columns;
  return row(made);
}

export function showEngine(status) {
  const memory = status.device_memory, weights = status.weight_memory ?? {}, sync = status.last_sync;
  const told = {
    engine: word(status.attachment, "ATTACHMENT_STATE_") || "unknown",
    model: status.model?.split("/").at(-1) ?? "none",
    "weight version": status.weight_version ?? 0,
    "optimizer step": status.optimizer_step ?? 0,
    "optimizer state": size(status.state_size_bytes),
    "weights shared with vLLM": size(weights.shared_bytes),
    "active run": (status.active_run_id ?? "none").slice(0, 8),
    waiting: status.queue_length ?? 0,
    operation: (status.active_operation_id || "none").slice(0, 8),
    "last sync": sync ? `version ${sync.weight_version ?? 0}, ${moment(sync.time)}` : "none",
  };
  if (memory) told[`memory of ${memory.device}`] = `${size(memory.used_bytes)} of ${size(memory.total_bytes)}`;
  const list = document.getElementById("engine");
  list.replaceChildren(...Object.entries(told).map(([name, value]) => {
    const [term, text] = [document.createElement("dt"), document.createElement("dd")];
    term.textContent = name;
    text.textContent = value;
    const pair = document.createElement("div");
    pair.append(term, text);
    return pair;
  }));
  document.getElementById("detail").textContent = status.attachment_detail ?? "";
  document.getElementById("queue").textContent = `${status.queue_length ?? 0} waiting`;
}

/** A run's row, and how its cells are brought up to date: what has the focus keeps it. */
export function runRow(run, style, onCurve, onChoose) {
  const box = document.createElement("input");
  box.type = "checkbox";
  box.checked = true;
  box.setAttribute("aria-label", `curve of run ${run.label}`);
  box.addEventListener("change", () => onCurve(box.checked));
  const swatch = element("svg", { class: "swatch", viewBox: "0 0 28 4", "aria-hidden": true });
  swatch.append(element("path", { class: `curve ${style}`, d: "M0 2H28" }));
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = run.label;
  button.title = run.id;
  button.addEventListener("click", onChoose);
  const [state, steps, loss, pause, began] = ["", "number", "number", "number", ""].map((s) => cell("", s));
  const first = cell(""), second = cell("");
  first.append(box, swatch);
  second.append(button);
  const made = row(first, second, state, steps, loss, pause, began);
  return {
    row: made,
    update(chosen) {
      button.setAttribute("aria-pressed", chosen);
      state.textContent = run.state + (run.failure ? ` (${run.failure.reason})` : "");
      state.className = { succeeded: "good", failed: "bad", rejected: "bad" }[run.state] ?? "";
      steps.textContent = `${run.points.at(-1)?.step ?? 0} of ${run.total ?? "?"}`;
      loss.textContent = run.points.length ? short(run.points.at(-1).loss) : "";
      pause.textContent = `${run.paused.toFixed(2)} s`;
      began.textContent = moment(run.began);
    },
  };
}

const verdict = (result) => cell(result ? (result.passed ? "passed" : "failed") : "-", result?.passed ? "good" : "bad");

export function showProbes(run) {
  const { before = [], after = [] } = run?.probes ?? {};
  const name = (result) => `${result.name} ${result.regression ?? false}`;
  const [was, is] = [before, after].map((results) => new Map(results.map((r) => [name(r), r])));
  const all = new Map([...was, ...is]);
  const rows = [...all].map(([key, last]) => row(
    cell(last.name, "wide"),
    cell(word(last.role, "PROBE_ROLE_") + (last.regression ? ", regression" : "")),
    verdict(was.get(key)),
    verdict(is.get(key)),
    cell(last.expected ?? "", "wide"),
    cell("log_probability" in last ? `log-probability ${short(last.log_probability)}` : last.answer ?? "", "wide"),
  ));
  document.getElementById("probes").replaceChildren(...(rows.length ? rows : [none(6, "none were asked")]));
  document.getElementById("probed").textContent = run ? `of run ${run.label}` : "";
  document.getElementById("notes").textContent = (run?.notes ?? []).join(" ");
}

export function showSnapshots(snapshots) {
  const rows = snapshots.map((each) => row(
    cell(each.name || "(automatic)", "wide"),
    cell(moment(each.create_time)),
    cell(each.weight_version ?? 0, "number"),
    cell(each.optimizer_step ?? 0, "number"),
    cell(size(each.size_bytes), "number"),
  ));
  document.getElementById("snapshots").replaceChildren(...(rows.length ? rows : [none(5, "none")]));
}
