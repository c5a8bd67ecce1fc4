//go:build linux

package main

// bench_chart_test.go draws the benchmark's ratios as bars, in SVG that reads well on a light and on a dark page.

import (
	"fmt"
	"html"
	"math"
	"strings"
)

const (
	chartWidth  = 840
	chartNames  = 190 // room for the names on the left
	chartPanel  = 300
	chartFigure = 50 // of it for the figures on its right
	chartGap    = 40
	chartRow    = 22
	chartBar    = 14
	chartHeader = 64
)

const chartStyle = `<style>
text { font: 13px system-ui, sans-serif; fill: #57606a }
.title { font-size: 15px; font-weight: 600 }
.figure { font-size: 12px }
.bar { fill: #8c959f }
.ours { fill: #1f7a4d }
.line { stroke: #8c959f; stroke-dasharray: 3 3 }
@media (prefers-color-scheme: dark) {
  text { fill: #adbac7 }
  .ours { fill: #3fb27f }
}
</style>
`

// chart is the report's throughput at 8 at once and at 1, of the bare loop.
func (r *benchReport) chart() string {
	var out strings.Builder
	height := chartHeader + chartRow*len(r.b.contestants) + 16
	fmt.Fprintf(&out, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" role="img" aria-label="%s">`+"\n%s",
		chartWidth, height, chartWidth, "Tasks per second, of a bare loop that runs the same command", chartStyle)
	label := func(x, y int, class, anchor, text string) {
		fmt.Fprintf(&out, `<text x="%d" y="%d" class="%s" text-anchor="%s">%s</text>`+"\n", x, y, class, anchor, html.EscapeString(text))
	}
	label(0, 18, "title", "start", "Tasks per second, of a bare loop that runs the same command")
	slotsShown, scale := []int{8, 1}, 1.0
	for _, slots := range slotsShown {
		for _, c := range r.b.contestants {
			if v := r.perSlots[slots].of(c.name, "ratio"); !math.IsNaN(v) {
				scale = max(scale, v)
			}
		}
	}
	width := func(ratio float64) int { return int(ratio / scale * (chartPanel - chartFigure)) }
	for panel, slots := range slotsShown {
		left := chartNames + panel*(chartPanel+chartGap)
		sheet := r.perSlots[slots]
		label(left, 48, "figure", "start", fmt.Sprintf("%d at once (bare loop: %s/s)", slots, thousands(sheet.of(benchRaw, "tasks/s"))))
		for i, c := range r.b.contestants {
			top := chartHeader + i*chartRow
			if panel == 0 {
				label(chartNames-10, top+chartBar-2, "figure", "end", c.name)
			}
			ratio := sheet.of(c.name, "ratio")
			if math.IsNaN(ratio) {
				continue
			}
			class := "bar"
			if c.ours {
				class = "ours"
			}
			fmt.Fprintf(&out, `<rect x="%d" y="%d" width="%d" height="%d" rx="2" class="%s"/>`+"\n", left, top, width(ratio), chartBar, class)
			label(left+chartPanel, top+chartBar-2, "figure", "end", fmt.Sprintf("%.2f", ratio))
		}
		fmt.Fprintf(&out, `<line x1="%d" y1="%d" x2="%d" y2="%d" class="line"/>`+"\n", left+width(1), chartHeader-8, left+width(1), height-8)
	}
	out.WriteString("</svg>\n")
	return out.String()
}
