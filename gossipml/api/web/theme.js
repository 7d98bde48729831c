// Light, dark, or as the system has it.

import { keep, kept, t } from "./words.js";

const THEMES = ["auto", "light", "dark"];
const SIGNS = { auto: "◐", light: "☀", dark: "☾" };
const NAMES = { auto: "themeAuto", light: "themeLight", dark: "themeDark" };
let theme = kept("theme", THEMES) ?? "auto";

export function nextTheme() {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  keep("theme", theme);
}

export function applyTheme(button) {
  document.documentElement.dataset.theme = theme;
  button.textContent = SIGNS[theme];
  button.setAttribute("aria-label", t(NAMES[theme]));
  button.title = t(NAMES[theme]);
}
