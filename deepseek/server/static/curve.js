// The loss of a training as a drawing: the training loss, and that on text it does not learn from.

import { byId, drawn } from "/static/dom.js";

/** @typedef {[number, number]} Point step and loss */

const BOX = { left: 46, right: 626, top: 12, bottom: 188, labels: 210 };

/** @param {Point[]} losses @param {Point[]} heldOut */
export function draw(losses, heldOut) {
  const points = [...losses, ...heldOut];
  byId("figure").hidden = points.length < 2;
  if (points.length < 2) return;
  const values = points.map(([, value]) => value);
  const last = Math.max(...points.map(([step]) => step), 1);
  const low = Math.min(...values);
  const high = Math.max(...values, low + 0.01);
  const x = (step) => BOX.left + (step / last) * (BOX.right - BOX.left);
  const y = (value) => BOX.top + ((high - value) / (high - low)) * (BOX.bottom - BOX.top);
  const line = (rows, name) =>
    drawn("polyline", { class: name, points: rows.map(([s, v]) => `${x(s)},${y(v)}`).join(" ") });
  byId("curve").replaceChildren(
    ...[low, (low + high) / 2, high].flatMap((value) => [
      drawn("line", { class: "grid", x1: BOX.left, x2: BOX.right, y1: y(value), y2: y(value) }),
      drawn("text", { x: BOX.left - 6, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(2)),
    ]),
    line(losses, "train"),
    line(heldOut, "held"),
    ...heldOut.map(([s, v]) => drawn("circle", { cx: x(s), cy: y(v), r: 3 })),
    drawn("text", { x: BOX.left, y: BOX.labels }, "step 0"),
    drawn("text", { x: BOX.right, y: BOX.labels, "text-anchor": "end" }, `${last}`),
  );
  byId("curve").setAttribute(
    "aria-label",
    told("Training loss", losses) + told(" Held-out loss", heldOut),
  );
}

const told = (name, rows) =>
  rows.length ? `${name} from ${rows[0][1].toFixed(2)} to ${rows.at(-1)[1].toFixed(2)}.` : "";
