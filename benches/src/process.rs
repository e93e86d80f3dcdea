//! Programs that are started, pinned, watched and ended: each by its process, never by name.

use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

/// How long a backend may take to listen, and to end.
const PATIENCE: Duration = Duration::from_secs(20);

/// The signal that asked this program to end; zero for none.
static SIGNAL: AtomicI32 = AtomicI32::new(0);

extern "C" fn note(signal: libc::c_int) {
    SIGNAL.store(signal, Ordering::Relaxed);
}

/// From here on SIGINT, SIGTERM and SIGHUP end what is being waited for with an error, so that everything is
/// cleaned up on the way out.
pub fn catch_signals() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler stores to an atomic and does nothing else. Without SA_RESTART a read that waits
        // ends with EINTR.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = note as extern "C" fn(libc::c_int) as usize;
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
}

/// Whether this program was asked to end.
///
/// # Errors
/// When it was.
pub fn go_on() -> Result<(), String> {
    match interrupted() {
        0 => Ok(()),
        signal => Err(format!("ended by signal {signal}")),
    }
}

/// The signal that asked this program to end; zero for none.
pub fn interrupted() -> i32 {
    SIGNAL.load(Ordering::Relaxed)
}

/// How programs are put on CPUs.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pin {
    /// At the highest ordinary priority.
    pub nice: bool,
}

impl Pin {
    /// A command for a program on these CPUs. What it starts by exec keeps the process.
    pub fn command(self, cpus: &[usize], program: &OsStr) -> Command {
        let list: Vec<String> = cpus.iter().map(usize::to_string).collect();
        let mut words: Vec<OsString> = Vec::new();
        if self.nice {
            // Where the kernel shares CPUs by session first, priority within a session means little.
            let script = "echo -20 2>/dev/null >/proc/$$/autogroup; exec nice -n -20 \"$@\"";
            words.extend(["setsid", "sh", "-c", script, "sh"].map(OsString::from));
        }
        words.extend(["taskset", "-c", &list.join(",")].map(OsString::from));
        words.push(program.to_owned());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).stdin(Stdio::null());
        die_with_parent(&mut command);
        command
    }
}

/// A killed runner leaves nothing behind.
fn die_with_parent(command: &mut Command) {
    // SAFETY: prctl is async-signal-safe, and nothing else happens between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
}

/// A process that ends with this value.
#[derive(Debug)]
pub struct Running {
    child: Child,
}

impl Running {
    /// Starts it.
    ///
    /// # Errors
    /// Those of exec.
    pub fn start(command: &mut Command) -> io::Result<Self> {
        let child = command.spawn()?;
        Ok(Self { child })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The child itself, for its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Waits until its socket is there.
    ///
    /// # Errors
    /// When it ends before, or takes too long.
    pub fn wait_for_socket(&mut self, socket: &Path) -> Result<(), String> {
        let begin = Instant::now();
        while !socket.exists() {
            go_on()?;
            match self.child.try_wait() {
                Ok(None) => {}
                Ok(Some(status)) => return Err(format!("it ended at once: {status}")),
                Err(error) => return Err(error.to_string()),
            }
            if begin.elapsed() > PATIENCE {
                return Err(format!("no socket within {} s", PATIENCE.as_secs()));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// SIGTERM, and SIGKILL when that is not obeyed.
    ///
    /// # Errors
    /// When it had to be killed, or was already gone.
    pub fn stop(mut self) -> Result<(), String> {
        self.end()
    }

    fn end(&mut self) -> Result<(), String> {
        if let Ok(Some(status)) = self.child.try_wait() {
            return match status.success() {
                true => Ok(()),
                false => Err(format!("it ended by itself: {status}")),
            };
        }
        // SAFETY: our own child, not waited for yet: the number is still its own.
        unsafe { libc::kill(self.pid() as libc::pid_t, libc::SIGTERM) };
        let begin = Instant::now();
        while begin.elapsed() < PATIENCE {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        Err(format!(
            "it did not obey SIGTERM within {} s",
            PATIENCE.as_secs()
        ))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

/// Runs a program to its end and returns what it printed.
///
/// # Errors
/// When it cannot be started, fails, or this program is asked to end meanwhile;
/// what it said on standard error
/// is passed through.
pub fn output(command: &mut Command) -> Result<String, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut running = Running::start(command.stdout(Stdio::piped()))
        .map_err(|error| format!("{name}: {error}"))?;
    let mut text = Vec::new();
    if let Some(mut stdout) = running.child.stdout.take() {
        let mut buffer = [0; 8192];
        loop {
            match stdout.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => text.extend_from_slice(&buffer[..n]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => go_on()?,
                Err(error) => return Err(format!("{name}: {error}")),
            }
            go_on()?;
        }
    }
    let status = running.child.wait().map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&text).into_owned();
    match status.success() {
        true => Ok(text),
        false => Err(format!("{status}")),
    }
}

/// Whether a program is in the path.
pub fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(words: &[&str]) -> Command {
        let mut command = Command::new(words[0]);
        command.args(&words[1..]);
        command
    }

    #[test]
    fn what_a_program_prints_comes_back_and_its_failure_is_told() {
        assert_eq!(output(&mut command(&["echo", "x"])).unwrap(), "x\n");
        assert!(output(&mut command(&["false"])).is_err());
        assert!(output(&mut command(&["/no/such/program"])).is_err());
    }

    #[test]
    fn a_pinned_program_is_on_its_cpu_and_keeps_its_process() {
        let mut command = Pin::default().command(&[0], "sleep".as_ref());
        let running = Running::start(command.arg("60")).unwrap();
        let comm = format!("/proc/{}/comm", running.pid());
        while std::fs::read_to_string(&comm).unwrap() != "sleep\n" {
            std::thread::yield_now();
        }
        let status = std::fs::read_to_string(format!("/proc/{}/status", running.pid())).unwrap();
        assert!(status.contains("Cpus_allowed_list:\t0\n"), "{status}");
        let pid = running.pid();
        running.stop().unwrap();
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn a_program_that_ends_before_it_listens_is_told() {
        let mut running = Running::start(&mut command(&["true"])).unwrap();
        let error = running.wait_for_socket(Path::new("/no/such/socket"));
        assert!(error.unwrap_err().contains("ended at once"));
    }
}
