//! fio on the bare file: what the machine can do without anybody in between.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::load::Spec;
use crate::pattern::Load;
use crate::process::{self, Pin};
use crate::record::Record;

/// What fio calls a load; `None` for one that it does not have.
fn rw(load: Load) -> Option<&'static str> {
    match load {
        Load::Read => Some("read"),
        Load::Write => Some("write"),
        Load::Randread => Some("randread"),
        Load::Randwrite => Some("randwrite"),
        Load::Firstwrite | Load::Firstread => None,
    }
}

/// The options of a job: one thread, with everything that takes work from a request on its way.
fn args(spec: Spec, file: &Path, direct: bool, seconds: f64, warm_up: f64) -> Option<Vec<String>> {
    let mut args = vec![
        "--name=job".to_owned(),
        format!(
            "--filename={}",
            file.display().to_string().replace(':', "\\:")
        ),
        format!("--rw={}", rw(spec.load)?),
        format!("--bs={}", spec.block),
        format!("--iodepth={}", spec.depth),
        format!("--direct={}", u8::from(direct)),
        format!("--runtime={:.0}ms", seconds * 1000.0),
        format!("--ramp_time={:.0}ms", warm_up * 1000.0),
    ];
    let fixed = [
        "--ioengine=io_uring",
        "--fixedbufs=1",
        "--registerfiles=1",
        "--nonvectored=1",
        "--norandommap=1",
        "--random_generator=tausworthe64",
        "--time_based=1",
        "--thread=1",
        "--allow_file_create=0",
        "--lat_percentiles=1",
        "--clat_percentiles=0",
        "--percentile_list=50:99:99.9",
        "--output-format=json",
    ];
    args.extend(fixed.map(str::to_owned));
    if spec.depth > 1 {
        // What has completed is taken and replaced in one system call, as a backend would.
        args.push(format!("--iodepth_batch_submit={}", spec.depth));
        args.push("--iodepth_batch_complete_min=1".to_owned());
        args.push(format!("--iodepth_batch_complete_max={}", spec.depth));
    }
    Some(args)
}

/// Runs a load on a file, on the backend's CPU.
///
/// # Errors
/// When fio fails, or its output is not what is expected.
pub fn run(
    spec: Spec,
    file: &Path,
    direct: bool,
    (seconds, warm_up): (f64, f64),
    (pin, cpus): (Pin, &[usize]),
) -> Result<Record, String> {
    let args = args(spec, file, direct, seconds, warm_up).ok_or("fio has no such load")?;
    let mut command: Command = pin.command(cpus, "fio".as_ref());
    let text = process::output(command.args(args)).map_err(|error| format!("fio: {error}"))?;
    parse(&text, spec)
}

/// A record out of fio's JSON; who, where and which run are the caller's to fill in.
///
/// # Errors
/// What is missing in it.
pub fn parse(text: &str, spec: Spec) -> Result<Record, String> {
    // Notes may stand before the document.
    let start = text.find('{').ok_or("fio printed no JSON")?;
    let document: Value =
        serde_json::from_str(&text[start..]).map_err(|error| format!("fio's JSON: {error}"))?;
    let job = &document["jobs"][0];
    let way = &job[if spec.load.writes() { "write" } else { "read" }];
    let number = |value: &Value, name: &str| {
        let found = value[name].as_f64();
        found.ok_or_else(|| format!("fio's JSON has no {name}"))
    };
    let seconds = number(way, "runtime")? / 1e3;
    let requests = number(way, "total_ios")?;
    let lat = &way["lat_ns"];
    let percentile = |name| Ok::<f64, String>(number(&lat["percentile"], name)? / 1e3);
    // Shares of the time in percent.
    let cpu = (number(job, "usr_cpu")? + number(job, "sys_cpu")?) / 100.0 * seconds;
    Ok(Record {
        load: spec.name(),
        block_size: spec.block.into(),
        depth: spec.depth.into(),
        queues: 1,
        workers: 1,
        seconds,
        requests: requests as u64,
        errors: number(job, "total_err").unwrap_or(0.0) as u64 + u64::from(job["error"] != 0),
        iops: number(way, "iops")?,
        mean_us: number(lat, "mean")? / 1e3,
        p50_us: percentile("50.000000")?,
        p99_us: percentile("99.000000")?,
        p999_us: percentile("99.900000")?,
        backend_cpu_s: cpu,
        iops_per_cpu_s: if cpu > 0.0 { requests / cpu } else { 0.0 },
        read_bytes: number(&job["read"], "io_bytes").unwrap_or(0.0) as u64,
        write_bytes: number(&job["write"], "io_bytes").unwrap_or(0.0) as u64,
        ..Record::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::Layer;
    use clap::Parser;

    fn load(name: &str) -> Spec {
        let options = crate::options::Options::try_parse_from(["run", "--full"]).unwrap();
        let loads = crate::load::of(Layer::parse("raw-shm").unwrap(), &options, 1);
        loads.into_iter().find(|spec| spec.name() == name).unwrap()
    }

    const OUTPUT: &str = r#"note: something
{ "fio version" : "fio-3.33",
  "jobs" : [ { "jobname" : "job", "error" : 0, "usr_cpu" : 9.0, "sys_cpu" : 31.0,
    "read" : { "io_bytes" : 228937728, "runtime" : 500, "total_ios" : 55862, "iops" : 111724.0,
      "lat_ns" : { "mean" : 166699.5,
        "percentile" : { "50.000000" : 148480, "99.000000" : 618496, "99.900000" : 5013504 } } },
    "write" : { "io_bytes" : 0, "runtime" : 0, "total_ios" : 0, "iops" : 0.0 } } ] }"#;

    #[test]
    fn a_record_is_read_out_of_the_json() {
        let record = parse(OUTPUT, load("randread-4k-qd32")).unwrap();
        assert_eq!((record.requests, record.errors), (55862, 0));
        assert_eq!((record.p50_us, record.p999_us), (148.48, 5013.504));
        // 40 % of half a second.
        assert!((record.backend_cpu_s - 0.2).abs() < 1e-9);
        assert!((record.iops_per_cpu_s - 279_310.0).abs() < 1.0);
        assert_eq!(record.read_bytes, 228_937_728);
    }

    #[test]
    fn what_is_missing_in_the_json_is_told() {
        let writes = parse(OUTPUT, load("randwrite-4k-qd32")).unwrap_err();
        assert!(writes.contains("mean") || writes.contains("50"), "{writes}");
        assert!(parse("fio: no such file", load("read-128k-qd8")).is_err());
        assert!(parse("{", load("read-128k-qd8")).is_err());
        let failed = OUTPUT.replace("\"error\" : 0", "\"error\" : 5");
        assert_eq!(parse(&failed, load("randread-4k-qd32")).unwrap().errors, 1);
    }

    #[test]
    fn a_job_has_the_shape_of_the_load() {
        let args = args(load("randwrite-4k-qd32"), Path::new("/a:b"), true, 0.5, 0.2).unwrap();
        for wanted in [
            "--rw=randwrite",
            "--bs=4096",
            "--iodepth=32",
            "--direct=1",
            "--runtime=500ms",
            "--filename=/a\\:b",
        ] {
            assert!(args.iter().any(|arg| arg == wanted), "{wanted}: {args:?}");
        }
    }
}
