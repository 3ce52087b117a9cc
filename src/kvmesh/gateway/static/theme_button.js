// The button that goes through system, light and dark, and remembers.

import { setText } from "./dom.js";

const KEY = "kvmesh.theme";
const THEMES = ["system", "light", "dark"];

/** Wire the button; what is chosen already was applied before the page was drawn. */
export function setUpTheme(button) {
  const root = document.documentElement;
  const current = () => root.dataset.theme ?? "system";
  const say = () => setText(button, `theme: ${current()}`);
  button.addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(current()) + 1) % THEMES.length];
    if (next === "system") delete root.dataset.theme;
    else root.dataset.theme = next;
    try {
      localStorage.setItem(KEY, next);
    } catch {
      // Storage may be forbidden: the choice then lasts as long as the page.
    }
    say();
  });
  say();
}
