// What all pages share: their data, and the switch between light, dark and the system's own choice.
const DATA = JSON.parse(document.getElementById("data").textContent);

function element(tag, text, classes) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (classes) made.className = classes;
  return made;
}

const themeButton = document.getElementById("theme");
const THEMES = ["system", "light", "dark"];
let theme = "system";
function setTheme(name) {
  theme = THEMES.includes(name) ? name : "system";
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  if (themeButton) themeButton.textContent = "Theme: " + theme;
  document.dispatchEvent(new Event("themechange"));
}
if (themeButton) {
  themeButton.addEventListener("click", () => setTheme(THEMES[(THEMES.indexOf(theme) + 1) % 3]));
}
setTheme(new URLSearchParams(location.hash.slice(1)).get("theme") || "system");
