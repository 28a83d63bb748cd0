"use strict"
// The controls of the report; bokeh draws the charts.
window.forgepar = {
  seconds(s) {
    if (s == 0) return "0 s"
    if (s >= 7200) return (s / 3600).toFixed(2) + " h"
    if (s >= 120) return (s / 60).toFixed(1) + " min"
    if (s >= 1) return s.toFixed(s >= 10 ? 1 : 2) + " s"
    return s >= 1e-3 ? (s * 1e3).toFixed(s >= 0.1 ? 0 : 2) + " ms" : (s * 1e6).toFixed(1) + " µs"
  },

  bytes(n) {
    for (const unit of ["B", "KiB", "MiB", "GiB"]) {
      if (n < 1024) return n.toFixed(unit == "B" ? 0 : 1) + " " + unit
      n /= 1024
    }
    return n.toFixed(1) + " TiB"
  },

  // All ticks of an axis have the same unit, and enough decimals to differ.
  tick(tick, ticks) {
    const most = Math.max(...ticks.map(Math.abs))
    const [size, unit] = most >= 1 || most == 0 ? [1, "s"] : most >= 1e-3 ? [1e-3, "ms"] : [1e-6, "µs"]
    const step = ticks.length > 1 ? Math.abs(ticks[1] - ticks[0]) / size : 1
    const places = Math.ceil(-Math.log10(step) - 1e-6)
    return (tick / size).toFixed(Math.min(9, Math.max(0, places))) + " " + unit
  },

  plots() { return Bokeh.documents[0].roots() },
  plot(name) { return this.plots().find((plot) => plot.name == name) },
  drawn(name) { return this.plot("timeline").renderers.find((renderer) => renderer.name == name) },

  // The document calls this once the charts are drawn.
  ready() {
    const scheme = matchMedia("(prefers-color-scheme: dark)")
    if (scheme.matches) this.setColours(true)
    scheme.addEventListener("change", () => this.setColours(scheme.matches))
    this.recolour()
    this.showPath()
    document.documentElement.dataset.ready = Math.round(performance.now())
  },

  // Style sheets do not apply to a canvas, so the colours of the charts are set here.
  setColours(isDark) {
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
