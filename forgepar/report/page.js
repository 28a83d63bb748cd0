"use strict"
// The report's own controls; the charts are bokeh's.
window.forgepar = {
  plots() { return Bokeh.documents[0].roots() },
  plot(name) { return this.plots().find((plot) => plot.name == name) },
  drawn(name) { return this.plot("timeline").renderers.find((renderer) => renderer.name == name) },

  // The document calls this once all is drawn.
  ready() {
    const scheme = matchMedia("(prefers-color-scheme: dark)")
    if (scheme.matches) this.dress(true)
    scheme.addEventListener("change", () => this.dress(scheme.matches))
    this.recolour()
    this.showPath()
    document.documentElement.dataset.ready = Math.round(performance.now())
  },

  // What is drawn on a canvas knows no style sheet, so that it is told of a dark page here.
  dress(isDark) {
    const ink = isDark ? "#aab2bc" : "#5b636e"
    for (const plot of this.plots()) {
      for (const axis of [...plot.left, ...plot.below]) {
        axis.setv({major_label_text_color: ink, axis_label_text_color: ink, axis_line_color: ink, major_tick_line_color: ink})
      }
      for (const grid of plot.center) {
        if (grid.grid_line_color !== undefined) grid.setv({grid_line_color: ink})
      }
    }
    const path = this.drawn("critical path")
    path.glyph.line_color = isDark ? "#ffffff" : "#111418"
  },

  recolour() {
    const field = document.querySelector("input[name=colour]:checked").value
    const tasks = this.drawn("tasks")
    if (tasks.glyph.fill_color.field != field) {
      tasks.glyph.fill_color = {field, transform: this.plot("timeline").tags[0][field]}
    }
    for (const keys of document.querySelectorAll(".keys")) keys.hidden = keys.id != "keys-" + field
  },

  showPath() { this.drawn("critical path").visible = document.getElementById("show-path").checked },
}

document.addEventListener("change", (event) => {
  if (event.target.name == "colour") forgepar.recolour()
  if (event.target.id == "show-path") forgepar.showPath()
})
