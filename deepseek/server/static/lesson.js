// How a training goes, in words: steps, time left, curves, and the verdict at the end.

import { announce, byId, element } from "/static/dom.js";
import { draw } from "/static/curve.js";

/**
 * The progress of a training, as `GET /v1/teach` has it.
 * @typedef {object} Lesson
 * @property {string} name
 * @property {"none" | "running" | "stopped" | "failed" | "plugged"} state
 * @property {string} stage
 * @property {number} done
 * @property {number} total 0: unknown
 * @property {string} message
 * @property {[number, number][]} losses
 * @property {[number, number][]} held_out
 * @property {string} verdict
 * @property {boolean} armed
 * @property {number | null} before
 * @property {number | null} after
 * @property {number | null} gain
 * @property {string} story
 * @property {number} seconds
 * @property {number | null} expected_seconds
 */

// The stages of the server, in order, and the step that each belongs to.
const STEPS = [
  { words: "Read and clean the text", stages: /^(starting|clean|read|compare|commits|documents|files)/ },
  { words: "Cut it into tokens, and put a part aside to test on", stages: /^(tokenise|corpus)/ },
  { words: "Measure the base on the test text", stages: /^(scoring|cache|trunk|public text|replay|held-out|validation)/ },
  { words: "Train the expert", stages: /^train/ },
  { words: "Teach its gates when to stay silent", stages: /^(calibrating|public statistics|conversations|expected words|gates)/ },
  { words: "Find prompts that it answers and the base does not", stages: /^finding prompts/ },
];
const TRAINING = 3;

let reached = 0;
let shown = "";

/** @param {Lesson} lesson */
export function show(lesson) {
  const running = lesson.state === "running";
  byId("lesson-state").hidden = false;
  byId("lesson-start").disabled = running;
  byId("lesson-stop").hidden = !running;
  byId("lesson-stage").textContent = `${lesson.name}: ${TITLES[lesson.state]}`;
  byId("lesson-count").textContent = running ? timeLeft(lesson) : minutes(lesson.seconds);
  showSteps(lesson);
  byId("lesson-message").textContent = running ? lesson.message : "";
  showProgress(lesson);
  draw(lesson.losses, lesson.held_out);
  byId("verdict").hidden = running && !lesson.verdict;
  byId("verdict").className = `verdict ${lesson.armed ? "good" : "bad"}`;
  byId("verdict").replaceChildren(...verdict(lesson).map((textContent, place) => element(place ? "p" : "strong", { textContent })));
  say(lesson);
}

const TITLES = { running: "being taught", stopped: "stopped", failed: "failed", plugged: "taught" };

/** @param {Lesson} lesson */
export function verdict({ state, name, verdict: words, armed, gain, before, after, story, message }) {
  if (state === "failed") return ["The training failed.", message];
  if (state === "stopped") return ["Stopped.", "Nothing is lost: the same name and folder go on where it was."];
  const change = before === null ? words : `${gain < 0 ? "Worse" : "Better"} by ${Math.abs(100 * gain).toFixed(1)} %`;
  const losses = before === null ? "" : ` On text that it was not trained on, the loss went from ${before.toFixed(2)} to ${after.toFixed(2)}.`;
  const why = story ? ` ${story[0].toUpperCase()}${story.slice(1)}.` : "";
  if (armed) return [`${change}, and armed.`, `${name} writes where its subject comes up.${losses}${why}`];
  return [
    `${gain !== null && Math.abs(gain) < 0.0005 ? "No better than the base" : change}, and not armed.`,
    `An expert that does not help is never armed by itself; requests that name it can still use it.${losses}${why}`,
  ];
}

function showSteps({ state, stage }) {
  const found = STEPS.findIndex(({ stages }) => stages.test(stage));
  if (stage === "starting") reached = 0;
  else if (found > reached) reached = found;
  const ended = state === "plugged" ? STEPS.length : reached;
  byId("steps").replaceChildren(...STEPS.map(({ words }, place) => {
    const now = place === ended && state === "running";
    const made = element("li", { textContent: words, className: place < ended ? "done" : "" });
    if (now) made.setAttribute("aria-current", "step");
    return made;
  }));
}

function showProgress({ state, done, total }) {
  const bar = byId("lesson-progress");
  bar.hidden = state !== "running";
  if (total) [bar.max, bar.value] = [total, done];
  else bar.removeAttribute("value");
}

function timeLeft({ seconds, expected_seconds: expected, stage, done, total }) {
  const training = STEPS[TRAINING].stages.test(stage) && total ? ` · step ${done} of ${total}` : "";
  if (expected === null) return `${minutes(seconds)} so far`;
  const left = expected - seconds;
  return `${left > 5 ? `about ${minutes(left)} left` : "almost done"}${training}`;
}

/** A duration in words. @param {number} seconds */
export function minutes(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} seconds`;
  return `${(seconds / 60).toFixed(seconds < 600 ? 1 : 0).replace(".0", "")} minutes`;
}

/** Let a screen reader hear each step once, and the verdict. */
function say(lesson) {
  const words = lesson.state === "running" && !lesson.verdict ? STEPS[reached].words : verdict(lesson).join(" ");
  if (words !== shown) announce(words);
  shown = words;
}
