// Runs before the page is drawn, so that a chosen theme never flashes the other one.
(() => {
  "use strict";
  let chosen = null;
  try {
    chosen = localStorage.getItem("kvmesh.theme");
  } catch {
    /* storage may be forbidden: follow the system */
  }
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
