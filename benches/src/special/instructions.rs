//! Instructions of a request under callgrind, counted by the program beside this one: see
//! `benches/instructions`.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::process::{self, is_installed};
use crate::record::{Line, Special};
use crate::runner::Bench;

/// The figures of all cases that it prints, or those of the file that was given.
pub(super) fn measure(bench: &mut Bench) -> Result<(), String> {
    let text = match bench.options.instructions.clone() {
        Some(path) => std::fs::read_to_string(&path)
            .map_err(|error| format!("{}: {error}", path.display()))?,
        None => {
            let program = bench.built.join("instructions");
            if !program.is_file() {
                let why = "the program that counts them was not built";
                bench.missing("instructions", why);
                return Ok(());
            }
            if !is_installed("valgrind") {
                bench.missing("instructions", "valgrind is not installed");
                return Ok(());
            }
            let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("instructions.json");
            process::output(Command::new(program).arg("--file").arg(file))?
        }
    };
    let subject = bench
        .ours()
        .first()
        .map_or("virtioblkd".to_owned(), |s| s.name.clone());
    bench.add(Line::Special(parse(&text, &subject)));
    Ok(())
}

/// Out of the lines of JSON among what the program prints.
fn parse(text: &str, subject: &str) -> Special {
    let mut special = Special::new("instructions", subject, 1);
    for line in text.lines() {
        let Ok(value) = serde_json::from_str::<Value>(line) else {
            continue;
        };
        if let (Some(case), Some(count)) = (value["case"].as_str(), value["instructions"].as_f64())
        {
            special = special.with(case, count);
        }
    }
    special
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_json_are_found_among_others() {
        let text = "a request   instructions\n{\"case\":\"ring-split\",\"instructions\":31.5}\n\
                    {\"case\":\"ring-reference\",\"instructions\":900}\nrecorded\n";
        let special = parse(text, "x");
        assert_eq!(special.figures["ring-split"], 31.5);
        assert_eq!(special.figures["ring-reference"], 900.0);
        assert_eq!(special.figures.len(), 2);
    }
}
