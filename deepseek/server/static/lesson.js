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
  { words: "Read and clean the text", stages: /^(starting|clean|compare)/ },
  { words: "Cut it into tokens, and put a part aside to test on", stages: /^tokenise/ },
  {
    words: "Prepare everyday text, and measure the base",
    stages: /^(conversations|public text|trunk|scoring the base)/,
  },
  { words: "Train the expert", stages: /^train$/ },
  {
    words: "Calibrate its gates, so that it is silent elsewhere",
    stages: /^(calibrating|public statistics|expected words)/,
  },
  { words: "Find prompts that it answers and the base does not", stages: /^finding prompts/ },
];
const TRAINING = 3;
const LEAST_GAIN = 0.0005; // as in the manifest of packs

let reached = 0;
let shown = "";

/** @param {Lesson} lesson */
export function show(lesson) {
  if (lesson.state === "none") return showLost();
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
  byId("verdict").replaceChildren(
    ...verdict(lesson).map((textContent, place) =>
      element(place ? "p" : "strong", { textContent }),
    ),
  );
  say(lesson);
}

/** The server knows of no lesson: it was started anew since the one that is shown. */
function showLost() {
  byId("lesson-start").disabled = false;
  byId("lesson-stop").hidden = true;
  byId("lesson-count").textContent = "";
  byId("lesson-progress").hidden = true;
  byId("verdict").hidden = true;
  byId("lesson-stage").textContent = "The server was started anew.";
  byId("lesson-message").textContent =
    "The lesson runs no longer. The same name and folder go on where it was.";
  announce("The server was started anew, and the lesson runs no longer.");
}

const TITLES = { running: "being taught", stopped: "stopped", failed: "failed", plugged: "taught" };

/**
 * The outcome of a lesson: a title and an explanation.
 * @param {Lesson} lesson
 */
export function verdict(lesson) {
  const { state, name, armed, gain, before, after, story } = lesson;
  if (state === "failed") return ["The training failed.", lesson.message];
  if (state === "stopped")
    return ["Stopped.", "Nothing is lost: the same name and folder go on where it was."];
  const losses =
    before === null
      ? ""
      : ` On text that it was not trained on, the loss went from ${before.toFixed(2)} to ${after.toFixed(2)}.`;
  const why = losses + (story ? ` ${story[0].toUpperCase()}${story.slice(1)}.` : "");
  const change = changed(lesson);
  if (armed) return [`${change}, and armed.`, `${name} writes where its subject comes up.${why}`];
  const reason =
    gain >= LEAST_GAIN
      ? "The server arms only the experts that it was told to; the expert's switch adds it to a chat."
      : "An expert that does not help is never armed by itself; requests that name it can still use it.";
  return [`${change}, and not armed.`, reason + why];
}

function changed({ gain, verdict: words }) {
  if (gain === null) return words;
  if (Math.abs(gain) < LEAST_GAIN) return "No better than the base";
  return `${gain < 0 ? "Worse" : "Better"} by ${Math.abs(100 * gain).toFixed(1)} %`;
}

function showSteps({ state, stage }) {
  const found = STEPS.findIndex(({ stages }) => stages.test(stage));
  if (stage === "starting") reached = 0;
  else if (found > reached) reached = found;
  const ended = state === "plugged" ? STEPS.length : reached;
  byId("steps").replaceChildren(
    ...STEPS.map(({ words }, place) => {
      const now = place === ended && state === "running";
      const made = element("li", { textContent: words, className: place < ended ? "done" : "" });
      if (now) made.setAttribute("aria-current", "step");
      return made;
    }),
  );
}

function showProgress({ state, done, total }) {
  const bar = byId("lesson-progress");
  bar.hidden = state !== "running";
  if (total) [bar.max, bar.value] = [total, done];
  else bar.removeAttribute("value");
}

/** How long it may take yet. The plan is known when training begins, and covers it alone. */
function timeLeft({ seconds, expected_seconds: expected, stage, done, total }) {
  if (reached !== TRAINING || expected === null || !STEPS[TRAINING].stages.test(stage))
    return `${minutes(seconds)} so far`;
  const left = Math.max(0, expected - seconds);
  return `step ${done} of ${total}, about ${minutes(left)} of training left`;
}

/** A duration in words. @param {number} seconds */
export function minutes(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} seconds`;
  return `${(seconds / 60).toFixed(seconds < 600 ? 1 : 0).replace(".0", "")} minutes`;
}

/** Let a screen reader hear each step once, and the verdict. */
function say(lesson) {
  const words =
    lesson.state === "running" && !lesson.verdict
      ? STEPS[reached].words
      : verdict(lesson).join(" ");
  if (words !== shown) announce(words);
  shown = words;
}
