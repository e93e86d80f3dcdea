//! The device's internal state, for a VMM that asks for it (vhost-user.rst, "Migrating back-end state").
//!
//! Everything that a disk has to take along is in its image, in guest memory and in what the VMM negotiates. What
//! is left is what the driver set: the write cache's mode, the features it accepted, the device status. It goes
//! through the pipe as [`STATE_BYTES`] bytes, little-endian: a magic number, a version, the features, the mode, the
//! status, zeros.
//!
//! So few bytes fit into any pipe, so nothing here waits for the VMM's other end but the check of a state that is
//! to be loaded: that waits for the end of the pipe, which the VMM has closed by then, and not for long.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use log::{info, warn};
use vhost::vhost_user::Result;
use vhost::vhost_user::message::{
    VhostTransferStateDirection as Direction, VhostUserProtocolFeatures as Protocol,
};

use super::{SESSION_FEATURES, Session, refuse};
use crate::vhost_user::rings::Ring;
use crate::virtio::blk::config::WRITE_CACHE_OFFSET;

/// `"virtiobd"`.
const MAGIC: [u8; 8] = *b"virtiobd";
const VERSION: u32 = 1;
/// Bytes of a state: magic, version, features, write cache, status, and room.
const STATE_BYTES: usize = 32;
/// How long the end of a state is waited for.
const PATIENCE: Duration = Duration::from_secs(2);

/// A transfer that was begun and not checked.
#[derive(Debug)]
pub(super) enum Transfer {
    /// All of it was written.
    Saved,
    /// The state comes from here.
    Load(File),
}

/// What a driver has set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State {
    features: u64,
    write_cache: bool,
    status: u8,
}

impl State {
    fn to_bytes(self) -> [u8; STATE_BYTES] {
        let mut bytes = [0; STATE_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..20].copy_from_slice(&self.features.to_le_bytes());
        bytes[20] = u8::from(self.write_cache);
        bytes[21] = self.status;
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> std::result::Result<Self, String> {
        let Ok(bytes) = <[u8; STATE_BYTES]>::try_from(bytes) else {
            return Err(format!(
                "it has {} bytes and not {STATE_BYTES}",
                bytes.len()
            ));
        };
        if bytes[..8] != MAGIC {
            return Err("it is the state of something else".to_owned());
        }
        let version = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
        if version != VERSION {
            return Err(format!(
                "it has version {version}, and this program knows version {VERSION}"
            ));
        }
        if bytes[20] > 1 || bytes[22..].iter().any(|byte| *byte != 0) {
            return Err("it has values that mean nothing".to_owned());
        }
        let mut features = [0; 8];
        features.copy_from_slice(&bytes[12..20]);
        Ok(Self {
            features: u64::from_le_bytes(features),
            write_cache: bytes[20] == 1,
            status: bytes[21],
        })
    }
}

/// Waits until a file can be read from, or written to; false when `until` is over.
fn ready(file: &File, events: libc::c_short, until: Instant) -> bool {
    let mut poll = libc::pollfd {
        fd: file.as_raw_fd(),
        events,
        revents: 0,
    };
    let left = until.saturating_duration_since(Instant::now());
    let millis = i32::try_from(left.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: one valid pollfd for the length of the call.
    unsafe { libc::poll(&mut poll, 1, millis) == 1 }
}

/// All of a state, up to the end of the pipe.
fn read_all(mut file: File) -> std::result::Result<Vec<u8>, String> {
    let until = Instant::now() + PATIENCE;
    let mut bytes = Vec::new();
    let mut part = [0; 2 * STATE_BYTES];
    loop {
        if !ready(&file, libc::POLLIN, until) {
            let patience = PATIENCE.as_secs();
            return Err(format!("its end did not come within {patience} s"));
        }
        match file.read(&mut part) {
            Ok(0) => return Ok(bytes),
            Ok(len) => bytes.extend_from_slice(&part[..len]),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(format!("reading it: {error}")),
        }
        if bytes.len() > STATE_BYTES {
            return Err(format!("it has more than {STATE_BYTES} bytes"));
        }
    }
}

impl Session {
    /// `SET_DEVICE_STATE_FD`.
    pub(super) fn transfer_state(&mut self, direction: Direction, mut file: File) -> Result<()> {
        if self.protocol & Protocol::DEVICE_STATE.bits() == 0 {
            return Err(refuse("DEVICE_STATE was not negotiated"));
        }
        if let Some(index) = self.rings.iter().position(Ring::is_running) {
            return Err(refuse(format!(
                "ring {index} is running: the device has no state to be transferred"
            )));
        }
        self.transfer = None;
        if direction == Direction::LOAD {
            self.transfer = Some(Transfer::Load(file));
            return Ok(());
        }
        let mode = self
            .device
            .config(WRITE_CACHE_OFFSET, 1)
            .map_err(|why| refuse(format!("the write cache's mode: {why}")))?;
        let state = State {
            features: self.features & !SESSION_FEATURES,
            write_cache: mode == [1],
            status: self.status,
        };
        let until = Instant::now() + PATIENCE;
        if !ready(&file, libc::POLLOUT, until) {
            return Err(refuse("the pipe for the device's state is full"));
        }
        file.write_all(&state.to_bytes())
            .map_err(|error| refuse(format!("writing the device's state: {error}")))?;
        info!("{}: the device's state was saved", self.name);
        self.transfer = Some(Transfer::Saved);
        Ok(())
    }

    /// `CHECK_DEVICE_STATE`: whether the transfer succeeded. A state that is to be loaded is taken over here.
    pub(super) fn check_state(&mut self) -> Result<()> {
        let loaded = match self.transfer.take() {
            None => Err("no transfer was begun, or it failed".to_owned()),
            Some(Transfer::Saved) => return Ok(()),
            Some(Transfer::Load(file)) => read_all(file)
                .and_then(|bytes| State::from_bytes(&bytes))
                .and_then(|state| self.load_state(state)),
        };
        loaded.map_err(|why| {
            // The VMM gets a number and says no more than that.
            warn!("{}: the device's state was refused: {why}", self.name);
            refuse(format!("the device's state: {why}"))
        })
    }

    fn load_state(&mut self, state: State) -> std::result::Result<(), String> {
        let unknown = state.features & !self.device.features();
        if unknown != 0 {
            return Err(format!(
                "its driver accepted features {unknown:#x}, which are not offered here; serve the disk as at \
                 the source"
            ));
        }
        if let Some(index) = self.rings.iter().position(Ring::is_running) {
            return Err(format!("ring {index} is running"));
        }
        self.device.set_acked_features(state.features);
        // After the features, which may change it.
        self.device
            .set_config(WRITE_CACHE_OFFSET, &[u8::from(state.write_cache)])?;
        self.features = self.features & SESSION_FEATURES | state.features;
        self.status = state.status;
        info!("{}: the device's state was loaded", self.name);
        Ok(())
    }
}
