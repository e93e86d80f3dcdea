//! Plots as SVG: bars of ratios, and latency by depth. Nothing but text, so no library.

use std::fmt::Write;

use crate::record::{Record, Records, median};

const COLOURS: [&str; 8] = [
    "#1b6ca8", "#d1495b", "#edae49", "#66a182", "#8d6a9f", "#555555", "#2e4057", "#c97b63",
];

/// Text that may stand in XML.
fn escape(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    text.replace('>', "&gt;").replace('"', "&quot;")
}

/// A drawing that grows.
struct Svg {
    body: String,
    width: f64,
    height: f64,
}

impl Svg {
    fn new(width: f64, height: f64) -> Self {
        Self {
            body: String::new(),
            width,
            height,
        }
    }

    fn text(&mut self, (x, y): (f64, f64), anchor: &str, text: &str) {
        let text = escape(text);
        let _ = writeln!(
            self.body,
            r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{text}</text>"#
        );
    }

    fn line(&mut self, (x1, y1): (f64, f64), (x2, y2): (f64, f64), style: &str) {
        let _ = writeln!(
            self.body,
            r#"<line x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}" {style}/>"#
        );
    }

    fn bar(&mut self, (x, y): (f64, f64), (width, height): (f64, f64), colour: &str) {
        let _ = writeln!(
            self.body,
            r#"<rect x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}" fill="{colour}"/>"#
        );
    }

    fn dot(&mut self, (x, y): (f64, f64), colour: &str) {
        let _ = writeln!(
            self.body,
            r#"<circle cx="{x:.1}" cy="{y:.1}" r="3" fill="{colour}"/>"#
        );
    }

    fn finish(self) -> String {
        let (width, height) = (self.width, self.height);
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" \
             viewBox=\"0 0 {width:.0} {height:.0}\" font-family=\"sans-serif\" font-size=\"11\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{}</svg>\n",
            self.body
        )
    }
}

/// Distinct values in the order in which they appear.
fn distinct<'a, T: PartialEq>(values: impl Iterator<Item = T> + 'a) -> Vec<T> {
    let mut seen = Vec::new();
    for value in values {
        if !seen.contains(&value) {
            seen.push(value);
        }
    }
    seen
}

/// Bars of ours / others in IOPS, a group for each layer and load, on a logarithmic scale around 1; `None`
/// where nothing can be compared.
pub fn ratios(records: &Records, ours: &str) -> Option<String> {
    let others = distinct(
        records
            .runs
            .iter()
            .map(|r| r.subject.as_str())
            .filter(|s| *s != ours),
    );
    let cells = distinct(
        records
            .runs
            .iter()
            .map(|r| (r.layer.as_str(), r.load.as_str())),
    );
    let iops = |who: &str, (layer, load): (&str, &str)| {
        median(records.of(who, layer, load).map(|r| r.iops))
    };
    let mut groups = Vec::new();
    for cell in cells {
        let ratios: Vec<(usize, f64)> = others
            .iter()
            .enumerate()
            .filter_map(|(index, other)| Some((index, iops(ours, cell)? / iops(other, cell)?)))
            .filter(|(_, ratio)| ratio.is_finite() && *ratio > 0.0)
            .collect();
        if !ratios.is_empty() {
            groups.push((cell, ratios));
        }
    }
    let all = || {
        groups
            .iter()
            .flat_map(|(_, ratios)| ratios.iter().map(|(_, ratio)| *ratio))
    };
    if groups.is_empty() {
        return None;
    }
    // Powers of two that hold all of them.
    let low = all().fold(1.0, f64::min).log2().floor().max(-6.0);
    let high = all().fold(2.0, f64::max).log2().ceil().min(8.0);
    let (left, plot, thick) = (250.0, 560.0, 12.0);
    let x_of = |ratio: f64| left + plot * (ratio.log2().clamp(low, high) - low) / (high - low);
    let bars: usize = groups.iter().map(|(_, ratios)| ratios.len()).sum();
    let bottom = 50.0 + bars as f64 * thick + groups.len() as f64 * 8.0;
    let mut svg = Svg::new(left + plot + 70.0, bottom + 30.0);
    svg.text(
        (10.0, 18.0),
        "start",
        &format!("IOPS, {ours} / others (right of 1 is faster)"),
    );
    for (index, other) in others.iter().enumerate() {
        let x = left + 130.0 * index as f64;
        svg.bar((x, 26.0), (10.0, 10.0), COLOURS[index % COLOURS.len()]);
        svg.text((x + 14.0, 35.0), "start", other);
    }
    for power in low as i32..=high as i32 {
        let x = x_of(f64::from(power).exp2());
        let style = match power {
            0 => r##"stroke="#000""##,
            _ => r##"stroke="#ddd""##,
        };
        svg.line((x, 44.0), (x, bottom), style);
        svg.text(
            (x, bottom + 14.0),
            "middle",
            &format!("{}", f64::from(power).exp2()),
        );
    }
    let mut y = 50.0;
    for ((layer, load), ratios) in groups {
        let middle = y + ratios.len() as f64 * thick / 2.0 + 4.0;
        svg.text((left - 6.0, middle), "end", &format!("{layer} {load}"));
        for (index, ratio) in ratios {
            let (one, x) = (x_of(1.0), x_of(ratio));
            let colour = COLOURS[index % COLOURS.len()];
            svg.bar(
                (one.min(x), y),
                ((x - one).abs().max(1.0), thick - 2.0),
                colour,
            );
            svg.text((one.max(x) + 4.0, y + 9.0), "start", &format!("{ratio:.2}"));
            y += thick;
        }
        y += 8.0;
    }
    Some(svg.finish())
}

/// p50 (full lines) and p99 (dashed) by depth, a panel for each layer with 4 KiB reads or writes at several
/// depths; `None` without any.
pub fn latencies(records: &Records) -> Option<String> {
    let is_point = |r: &&Record| {
        let (kind, rest) = r.load.split_once("-4k-qd").unwrap_or_default();
        !kind.is_empty() && rest.parse::<u32>().is_ok()
    };
    let points: Vec<&Record> = records.runs.iter().filter(is_point).collect();
    let kind = |r: &Record| r.load.split('-').next().unwrap_or_default().to_owned();
    let mut panels = distinct(points.iter().map(|r| (r.layer.clone(), kind(r))));
    let depths = |panel: &(String, String)| {
        let of = points
            .iter()
            .filter(|r| (&r.layer, &kind(r)) == (&panel.0, &panel.1));
        distinct(of.map(|r| r.depth))
    };
    panels.retain(|panel| depths(panel).len() > 1);
    if panels.is_empty() {
        return None;
    }
    let subjects = distinct(points.iter().map(|r| r.subject.as_str()));
    let (width, height, columns) = (380.0, 240.0, 2);
    let rows = panels.len().div_ceil(columns);
    let mut svg = Svg::new(width * columns as f64, 40.0 + height * rows as f64);
    for (index, subject) in subjects.iter().enumerate() {
        let x = 10.0 + 110.0 * index as f64;
        svg.bar((x, 8.0), (10.0, 10.0), COLOURS[index % COLOURS.len()]);
        svg.text((x + 14.0, 17.0), "start", subject);
    }
    for (number, panel) in panels.iter().enumerate() {
        let x = width * (number % columns) as f64;
        let y = 40.0 + height * (number / columns) as f64;
        let of: Vec<&Record> = points
            .iter()
            .copied()
            .filter(|r| (&r.layer, &kind(r)) == (&panel.0, &panel.1))
            .collect();
        draw_panel(&mut svg, (x, y), (width, height), panel, &of, &subjects);
    }
    Some(svg.finish())
}

/// A figure of a run.
type Figure = fn(&Record) -> f64;

fn draw_panel(
    svg: &mut Svg,
    (x0, y0): (f64, f64),
    (width, height): (f64, f64),
    (layer, kind): &(String, String),
    records: &[&Record],
    subjects: &[&str],
) {
    let mut depths = distinct(records.iter().map(|r| r.depth));
    depths.sort_unstable();
    let values = || {
        records
            .iter()
            .flat_map(|r| [r.p50_us, r.p99_us])
            .filter(|v| *v > 0.0)
    };
    let low = values().fold(f64::INFINITY, f64::min).log10().floor();
    let high = values().fold(0.0, f64::max).log10().ceil().max(low + 1.0);
    if !(low.is_finite() && high.is_finite()) {
        return;
    }
    let (left, top, right, bottom) = (x0 + 50.0, y0 + 24.0, x0 + width - 20.0, y0 + height - 30.0);
    let steps = (depths.len() - 1).max(1) as f64;
    let x_of = |index: usize| left + (right - left) * index as f64 / steps;
    let y_of =
        |us: f64| bottom - (bottom - top) * (us.log10().clamp(low, high) - low) / (high - low);
    svg.text(
        (left, y0 + 14.0),
        "start",
        &format!("{layer}, 4 KiB {kind}: p50, p99 (dashed), µs"),
    );
    for power in low as i32..=high as i32 {
        let y = y_of(10f64.powi(power));
        svg.line((left, y), (right, y), r##"stroke="#ddd""##);
        svg.text(
            (left - 4.0, y + 4.0),
            "end",
            &format!("{}", 10f64.powi(power)),
        );
    }
    for (index, depth) in depths.iter().enumerate() {
        svg.text((x_of(index), bottom + 14.0), "middle", &format!("{depth}"));
    }
    for (number, subject) in subjects.iter().enumerate() {
        let colour = COLOURS[number % COLOURS.len()];
        let of: [(Figure, &str); 2] = [
            (|r| r.p50_us, ""),
            (|r| r.p99_us, r#" stroke-dasharray="4 3""#),
        ];
        for (figure, dash) in of {
            let style = format!(r#"stroke="{colour}" stroke-width="1.5"{dash}"#);
            let mut before = None;
            for (index, depth) in depths.iter().enumerate() {
                let runs = records
                    .iter()
                    .filter(|r| r.depth == *depth && r.subject == **subject);
                let Some(us) = median(runs.map(|r| figure(r))).filter(|us| *us > 0.0) else {
                    continue;
                };
                let at = (x_of(index), y_of(us));
                if let Some(before) = before.replace(at) {
                    svg.line(before, at, &style);
                }
                svg.dot(at, colour);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(subject: &str, layer: &str, depth: u32, iops: f64) -> Record {
        Record {
            subject: subject.into(),
            layer: layer.into(),
            load: format!("randread-4k-qd{depth}"),
            depth,
            iops,
            p50_us: 1e6 * f64::from(depth) / iops,
            p99_us: 3e6 * f64::from(depth) / iops,
            ..Record::default()
        }
    }

    fn records() -> Records {
        let mut records = Records::default();
        for depth in [1, 32] {
            records.runs.push(run("ours <&>", "null", depth, 3000.0));
            records.runs.push(run("qsd", "null", depth, 1000.0));
        }
        records
    }

    /// Every element is closed, in order, and nothing else looks like one.
    fn assert_well_formed(svg: &str) {
        let mut open = Vec::new();
        for piece in svg.split('<').skip(1) {
            let (tag, rest) = piece.split_once('>').expect("a tag that ends");
            assert!(!rest.contains('>'), "{rest}");
            assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
            let name = tag
                .trim_start_matches('/')
                .split([' ', '/'])
                .next()
                .unwrap();
            if tag.starts_with('/') {
                assert_eq!(open.pop(), Some(name));
            } else if !tag.ends_with('/') {
                open.push(name);
            }
            let entities = rest.matches('&').count();
            let known = ["&amp;", "&lt;", "&gt;", "&quot;"];
            let fine: usize = known
                .iter()
                .map(|entity| rest.matches(entity).count())
                .sum();
            assert_eq!(entities, fine, "{rest}");
        }
        assert!(open.is_empty(), "{open:?}");
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }

    #[test]
    fn bars_are_well_formed_and_show_the_ratio() {
        let svg = ratios(&records(), "ours <&>").unwrap();
        assert_well_formed(&svg);
        assert!(svg.contains(">3.00<"));
        assert!(svg.contains("null randread-4k-qd32"));
    }

    #[test]
    fn latencies_are_well_formed_and_have_a_line_for_each_subject_and_quantile() {
        let svg = latencies(&records()).unwrap();
        assert_well_formed(&svg);
        assert_eq!(svg.matches("stroke-width").count(), 4);
        assert_eq!(svg.matches("<circle").count(), 8);
    }

    #[test]
    fn there_is_no_plot_without_anything_to_compare() {
        let mut records = records();
        records.runs.truncate(1);
        assert!(ratios(&records, "ours <&>").is_none());
        assert!(latencies(&records).is_none());
        assert!(latencies(&Records::default()).is_none());
    }

    #[test]
    fn extreme_ratios_stay_inside_the_drawing() {
        let mut records = Records::default();
        records.runs.push(run("a", "null", 1, 1e9));
        records.runs.push(run("b", "null", 1, 1e-9));
        records.runs.push(run("c", "null", 1, 0.0));
        assert_well_formed(&ratios(&records, "a").unwrap());
    }
}
