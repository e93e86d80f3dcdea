//! What a backend does when there is nothing to do: its CPU time, and how soon it is back.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use vhost_user_frontend::sys::{EventFd, wait_readable};

use super::{Client, Options};
use crate::histogram::Histogram;
use crate::proc;
use crate::record::Special;

/// CPU that the backend uses with a session and no request, as a share of one CPU.
///
/// # Errors
/// When the backend goes away.
pub fn idle(options: &Options, client: &mut Client) -> Result<Special, Box<dyn Error>> {
    // A backend that learns from its load has to have had one.
    for _ in 0..1000 {
        client.one(0, options.patience())?;
    }
    std::thread::sleep(Duration::from_secs_f64(options.warm_up));
    let (cpu, at) = (proc::cpu_time(options.pid)?, Instant::now());
    std::thread::sleep(Duration::from_secs_f64(options.seconds));
    let cpu = (proc::cpu_time(options.pid)? - cpu).as_secs_f64();
    let share = cpu / at.elapsed().as_secs_f64();
    let special = Special::new("idle", &options.subject, options.run);
    Ok(special.with("cpu_percent", 100.0 * share))
}

/// A thread that sleeps on an eventfd, and says when it is awake: the least that a wake can cost.
struct Sleeper {
    eventfd: Arc<EventFd>,
    awake: Arc<AtomicU32>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Sleeper {
    fn new(cpu: usize) -> Result<Self, Box<dyn Error>> {
        let eventfd = Arc::new(EventFd::new()?);
        let awake = Arc::new(AtomicU32::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let (fd, counter, end) = (eventfd.clone(), awake.clone(), stop.clone());
        let thread = std::thread::Builder::new().spawn(move || {
            pin_thread(cpu);
            while let Ok(readable) = wait_readable(fd.raw(), Duration::from_secs(60)) {
                if readable {
                    counter.fetch_add(1, Ordering::Release);
                    fd.take();
                }
                if end.load(Ordering::Relaxed) {
                    break;
                }
            }
        })?;
        Ok(Self {
            eventfd,
            awake,
            stop,
            thread: Some(thread),
        })
    }

    /// Wakes it; the time until it says that it is awake.
    fn wake(&self) -> Result<Duration, Box<dyn Error>> {
        let before = self.awake.load(Ordering::Acquire);
        let begin = Instant::now();
        self.eventfd.signal()?;
        while self.awake.load(Ordering::Acquire) == before {
            std::hint::spin_loop();
            if begin.elapsed() > Duration::from_secs(10) {
                return Err("the thread that sleeps on an eventfd does not wake".into());
            }
        }
        Ok(begin.elapsed())
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.eventfd.signal();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Keeps the calling thread on a CPU; where that is refused it stays where it is.
fn pin_thread(cpu: usize) {
    // SAFETY: a set of CPUs is plain data, `CPU_SET` checks the number against its size, and the call
    // reads it.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
    }
}

/// The first request after a sleep of `gap`, and the bare wake of a thread on `cpu` after the same sleep, in
/// turns.
///
/// # Errors
/// When the backend hangs or goes away.
pub fn wake(
    options: &Options,
    client: &mut Client,
    gap: Duration,
    cpu: usize,
) -> Result<Special, Box<dyn Error>> {
    let sleeper = Sleeper::new(cpu)?;
    let (mut requests, mut wakes) = (Histogram::default(), Histogram::default());
    let rounds = (options.seconds / gap.as_secs_f64() / 2.0).ceil() as u32;
    let block = u64::from(options.block_size);
    for round in 0..rounds + 4 {
        std::thread::sleep(gap);
        let begin = Instant::now();
        let (end, ok) = client.one(u64::from(round) * block % client.part, options.patience())?;
        if !ok {
            return Err("a request failed".into());
        }
        std::thread::sleep(gap);
        let bare = sleeper.wake()?;
        // The first ones find cold caches on both sides.
        if round >= 4 {
            requests.record((end - begin).as_nanos() as u64);
            wakes.record(bare.as_nanos() as u64);
        }
    }
    let us = |histogram: &Histogram, share| histogram.quantile(share) as f64 / 1e3;
    let special = Special::new("wake", &options.subject, options.run);
    Ok(special
        .with("request_p50_us", us(&requests, 0.5))
        .with("request_p99_us", us(&requests, 0.99))
        .with("eventfd_p50_us", us(&wakes, 0.5))
        .with("eventfd_p99_us", us(&wakes, 0.99)))
}
