//! The messages of the protocol (QEMU, docs/interop/vhost-user.rst), each as a front end would send it.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use vhost_user_frontend as frontend;

use frontend::message::{
    config_payload, inflight_payload, memory_table, single_region, vring_state,
};
use frontend::{Device, sys};

/// What a message carries beside its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carries {
    Nothing,
    /// The memory file of each region.
    Memory,
    /// The memory file of the first region.
    Region,
    /// An eventfd.
    Event,
    /// One end of a socket.
    Socket,
    /// Shared memory of 1 MiB.
    Shared,
}

/// One message.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    pub id: u32,
    pub name: &'static str,
    /// A payload that is in order, for a device with its first ring made.
    pub payload: fn(&Device) -> Vec<u8>,
    pub carries: Carries,
    /// It has an answer of its own, whatever `need_reply` says.
    pub answers: bool,
}

const fn kind(
    id: u32,
    name: &'static str,
    payload: fn(&Device) -> Vec<u8>,
    carries: Carries,
    answers: bool,
) -> Kind {
    Kind {
        id,
        name,
        payload,
        carries,
        answers,
    }
}

fn nothing(_: &Device) -> Vec<u8> {
    Vec::new()
}

fn zero(_: &Device) -> Vec<u8> {
    vec![0; 8]
}

fn features(device: &Device) -> Vec<u8> {
    device.features().to_le_bytes().to_vec()
}

fn protocol_features(device: &Device) -> Vec<u8> {
    device.protocol_features().to_le_bytes().to_vec()
}

fn regions(device: &Device) -> Vec<u8> {
    let specs: Vec<_> = device.memory.regions().iter().map(|r| r.spec()).collect();
    memory_table(&specs)
}

fn region(device: &Device) -> Vec<u8> {
    single_region(&device.memory.regions()[0].spec()).to_vec()
}

fn addresses(device: &Device) -> Vec<u8> {
    // As of a ring at the beginning of the memory.
    let user = device.memory.regions()[0].spec().user_addr;
    let mut payload = vring_state(0, 0).to_vec();
    for word in [user, user + 0x4000, user + 0x2000, 0] {
        payload.extend_from_slice(&word.to_le_bytes());
    }
    payload
}

fn size(_: &Device) -> Vec<u8> {
    vring_state(0, 128).to_vec()
}

fn state(_: &Device) -> Vec<u8> {
    vring_state(0, 0).to_vec()
}

fn enable(_: &Device) -> Vec<u8> {
    vring_state(0, 1).to_vec()
}

fn log(_: &Device) -> Vec<u8> {
    // Bytes of the log, and where it begins in its file.
    [1u64 << 20, 0].map(u64::to_le_bytes).concat()
}

fn iotlb(_: &Device) -> Vec<u8> {
    vec![0; 32]
}

fn get_config(_: &Device) -> Vec<u8> {
    config_payload(0, 60, 0, &[0; 60])
}

fn set_config(_: &Device) -> Vec<u8> {
    config_payload(32, 1, 0, &[1])
}

fn inflight(_: &Device) -> Vec<u8> {
    inflight_payload(1 << 20, 0, 1, 128).to_vec()
}

fn uuid(_: &Device) -> Vec<u8> {
    vec![7; 16]
}

/// Every message from 1 on; what nobody has given a meaning yet is among them.
pub const MESSAGES: &[Kind] = &[
    kind(1, "GET_FEATURES", nothing, Carries::Nothing, true),
    kind(2, "SET_FEATURES", features, Carries::Nothing, false),
    kind(3, "SET_OWNER", nothing, Carries::Nothing, false),
    kind(4, "RESET_OWNER", nothing, Carries::Nothing, false),
    kind(5, "SET_MEM_TABLE", regions, Carries::Memory, false),
    kind(6, "SET_LOG_BASE", log, Carries::Shared, true),
    kind(7, "SET_LOG_FD", nothing, Carries::Event, false),
    kind(8, "SET_VRING_NUM", size, Carries::Nothing, false),
    kind(9, "SET_VRING_ADDR", addresses, Carries::Nothing, false),
    kind(10, "SET_VRING_BASE", state, Carries::Nothing, false),
    kind(11, "GET_VRING_BASE", state, Carries::Nothing, true),
    kind(12, "SET_VRING_KICK", zero, Carries::Event, false),
    kind(13, "SET_VRING_CALL", zero, Carries::Event, false),
    kind(14, "SET_VRING_ERR", zero, Carries::Event, false),
    kind(15, "GET_PROTOCOL_FEATURES", nothing, Carries::Nothing, true),
    kind(
        16,
        "SET_PROTOCOL_FEATURES",
        protocol_features,
        Carries::Nothing,
        false,
    ),
    kind(17, "GET_QUEUE_NUM", nothing, Carries::Nothing, true),
    kind(18, "SET_VRING_ENABLE", enable, Carries::Nothing, false),
    kind(19, "SEND_RARP", zero, Carries::Nothing, false),
    kind(20, "NET_SET_MTU", zero, Carries::Nothing, false),
    kind(21, "SET_BACKEND_REQ_FD", nothing, Carries::Socket, false),
    kind(22, "IOTLB_MSG", iotlb, Carries::Nothing, false),
    kind(23, "SET_VRING_ENDIAN", state, Carries::Nothing, false),
    kind(24, "GET_CONFIG", get_config, Carries::Nothing, true),
    kind(25, "SET_CONFIG", set_config, Carries::Nothing, false),
    kind(26, "CREATE_CRYPTO_SESSION", iotlb, Carries::Nothing, true),
    kind(27, "CLOSE_CRYPTO_SESSION", zero, Carries::Nothing, false),
    kind(28, "POSTCOPY_ADVISE", nothing, Carries::Nothing, true),
    kind(29, "POSTCOPY_LISTEN", nothing, Carries::Nothing, false),
    kind(30, "POSTCOPY_END", nothing, Carries::Nothing, true),
    kind(31, "GET_INFLIGHT_FD", inflight, Carries::Nothing, true),
    kind(32, "SET_INFLIGHT_FD", inflight, Carries::Shared, false),
    kind(33, "GPU_SET_SOCKET", nothing, Carries::Socket, false),
    kind(34, "RESET_DEVICE", nothing, Carries::Nothing, false),
    kind(35, "VRING_KICK", state, Carries::Nothing, false),
    kind(36, "GET_MAX_MEM_SLOTS", nothing, Carries::Nothing, true),
    kind(37, "ADD_MEM_REG", region, Carries::Region, false),
    kind(38, "REM_MEM_REG", region, Carries::Nothing, false),
    kind(39, "SET_STATUS", zero, Carries::Nothing, false),
    kind(40, "GET_STATUS", nothing, Carries::Nothing, true),
    kind(41, "GET_SHARED_OBJECT", uuid, Carries::Nothing, true),
    kind(42, "SET_DEVICE_STATE_FD", zero, Carries::Shared, true),
    kind(43, "CHECK_DEVICE_STATE", nothing, Carries::Nothing, true),
    kind(44, "GET_SHMEM_CONFIG", nothing, Carries::Nothing, true),
    kind(45, "message 45", zero, Carries::Nothing, false),
];

/// Descriptors to send with a message, kept open until they are sent.
#[derive(Default)]
pub struct Files(pub Vec<OwnedFd>);

impl Files {
    pub fn raw(&self) -> Vec<i32> {
        self.0.iter().map(AsRawFd::as_raw_fd).collect()
    }
}

impl Carries {
    /// Descriptors that are in order. Of a socket the other end is kept too, in `ends`.
    pub fn files(self, device: &Device, ends: &mut Vec<UnixStream>) -> Files {
        let memory = |n: usize| {
            let regions = &device.memory.regions()[..n];
            regions.iter().map(|r| dup(r.fd())).collect()
        };
        Files(match self {
            Self::Nothing => Vec::new(),
            Self::Memory => memory(device.memory.regions().len()),
            Self::Region => memory(1),
            Self::Event => vec![dup(sys::EventFd::new().unwrap().raw())],
            Self::Socket => {
                let (ours, theirs) = UnixStream::pair().unwrap();
                ends.push(ours);
                vec![theirs.into()]
            }
            Self::Shared => vec![sys::memfd(1 << 20).unwrap()],
        })
    }
}

/// Another descriptor of the same open file.
pub fn dup(fd: i32) -> OwnedFd {
    // SAFETY: the caller's descriptor is open for the call, and only borrowed.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    borrowed.try_clone_to_owned().unwrap()
}
