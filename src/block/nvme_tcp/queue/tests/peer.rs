//! The controller's side of an I/O queue, as a test wants it: bytes written by hand, on a thread of its own.
//!
//! It knows nothing of the code under test, and uses only the standard library.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};

/// What came in a command capsule.
#[derive(Clone, Debug)]
pub struct Command {
    pub sqe: [u8; 64],
    /// How many came before it on this peer, over all of its connections.
    pub number: usize,
}

impl Command {
    pub fn opcode(&self) -> u8 {
        self.sqe[0]
    }
    pub fn cid(&self) -> u16 {
        u16::from_le_bytes([self.sqe[2], self.sqe[3]])
    }
    pub fn slba(&self) -> u64 {
        u64::from_le_bytes(self.sqe[40..48].try_into().unwrap())
    }
    pub fn blocks(&self) -> usize {
        usize::from(u16::from_le_bytes([self.sqe[48], self.sqe[49]])) + 1
    }
    pub fn cdw(&self, n: usize) -> u32 {
        u32::from_le_bytes(self.sqe[n * 4..n * 4 + 4].try_into().unwrap())
    }
    pub fn data_len(&self) -> usize {
        u32::from_le_bytes(self.sqe[32..36].try_into().unwrap()) as usize
    }
}

/// What the peer does with a command.
#[derive(Clone, Debug, PartialEq)]
pub enum Do {
    /// What it says.
    It,
    /// This status (SCT and SC, CRD, DNR as in a completion queue entry without the phase bit), and nothing else.
    Fail(u16),
    /// Nothing, until [`Peer::answer_held`].
    Hold,
    /// Reads nothing any more until [`Peer::go_on`], and answers nothing.
    Stall,
    /// Closes the connection without an answer.
    Cut,
    /// Executes it, and closes the connection without an answer.
    ExecuteAndCut,
    /// Sends half of the data of a read, and then nothing any more until the connection is closed.
    SendHalf,
    /// Answers with wrong data digests.
    WrongDigest,
    /// Sends these bytes instead of an answer.
    Say(Vec<u8>),
    /// Answers with these data, of whatever command.
    Give(Vec<u8>),
}

type Script = Box<dyn FnMut(&Command) -> Do + Send>;

#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub block: usize,
    pub header_digest: bool,
    pub data_digest: bool,
    /// Data of a read go in PDUs of this many bytes.
    pub pdu: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            block: 512,
            header_digest: false,
            data_digest: false,
            pdu: 64 << 10,
        }
    }
}

struct State {
    script: Script,
    /// Every command that came.
    seen: Vec<Command>,
    /// Of connections: what is needed to answer later, and to close.
    held: Vec<(Command, TcpStream)>,
    open: Vec<TcpStream>,
    /// The hosts' ends: a path's thread keeps a second descriptor of a connection, too.
    hosts: Vec<TcpStream>,
    stalled: bool,
    /// Threads that serve connections.
    serving: usize,
    /// H2CTermReqs that came.
    terminated: usize,
    /// Data that came with commands of reservations.
    keys: Vec<Vec<u8>>,
}

/// A controller with a namespace in memory. Its connections share both.
#[derive(Clone)]
pub struct Peer {
    options: Options,
    disk: Arc<Mutex<Vec<u8>>>,
    state: Arc<Mutex<State>>,
}

impl Peer {
    pub fn new(bytes: usize, options: Options) -> Self {
        Self::over(Arc::new(Mutex::new(vec![0; bytes])), options)
    }

    /// The same namespace behind another controller.
    pub fn sibling(&self) -> Self {
        Self::over(self.disk.clone(), self.options)
    }

    fn over(disk: Arc<Mutex<Vec<u8>>>, options: Options) -> Self {
        let state = State {
            script: Box::new(|_| Do::It),
            seen: Vec::new(),
            held: Vec::new(),
            open: Vec::new(),
            hosts: Vec::new(),
            stalled: false,
            serving: 0,
            terminated: 0,
            keys: Vec::new(),
        };
        Self {
            options,
            disk,
            state: Arc::new(Mutex::new(state)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub fn script(&self, script: impl FnMut(&Command) -> Do + Send + 'static) {
        self.lock().script = Box::new(script);
    }

    pub fn seen(&self) -> Vec<Command> {
        self.lock().seen.clone()
    }

    pub fn forget(&self) {
        self.lock().seen.clear();
    }

    pub fn keys(&self) -> Vec<Vec<u8>> {
        self.lock().keys.clone()
    }

    pub fn terminated(&self) -> usize {
        self.lock().terminated
    }

    /// The namespace's bytes.
    pub fn with_disk<T>(&self, f: impl FnOnce(&mut Vec<u8>) -> T) -> T {
        f(&mut self.disk.lock().unwrap())
    }

    /// Closes all connections.
    pub fn cut(&self) {
        let mut state = self.lock();
        state.held.clear();
        for stream in state.open.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Reads again.
    pub fn go_on(&self) {
        self.lock().stalled = false;
    }

    /// Connections that have not ended.
    pub fn serving(&self) -> usize {
        self.lock().serving
    }

    /// Does now what was held.
    pub fn answer_held(&self) {
        let held = std::mem::take(&mut self.lock().held);
        for (command, stream) in held {
            let _ = self.execute(&stream, &command, Vec::new());
        }
    }

    /// Answers a held command with a status; false if it is not held.
    pub fn fail_held(&self, cid: u16, status: u16) -> bool {
        let held = {
            let mut state = self.lock();
            let index = state.held.iter().position(|held| held.0.cid() == cid);
            index.map(|index| state.held.remove(index))
        };
        match held {
            Some((command, stream)) => self.respond(&stream, &command, status).is_ok(),
            None => false,
        }
    }

    /// A connection to a new thread that serves it.
    pub fn connect(&self) -> TcpStream {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (stream, _) = listener.accept().unwrap();
        stream.set_nodelay(true).unwrap();
        {
            let mut state = self.lock();
            state.open.push(stream.try_clone().unwrap());
            state.hosts.push(host.try_clone().unwrap());
            state.serving += 1;
        }
        let peer = self.clone();
        std::thread::spawn(move || {
            let _ = peer.serve(&stream);
            let _ = stream.shutdown(Shutdown::Both);
            peer.lock().serving -= 1;
        });
        host
    }

    fn digests(&self) -> (usize, usize) {
        let bytes = |on| if on { 4 } else { 0 };
        (
            bytes(self.options.header_digest),
            bytes(self.options.data_digest),
        )
    }

    fn serve(&self, mut stream: &TcpStream) -> io::Result<()> {
        // Writes whose data were asked for, by command identifier: what came so far.
        let mut writes: HashMap<u16, (Command, Vec<u8>)> = HashMap::new();
        let (header_digest, data_digest) = self.digests();
        loop {
            let mut common = [0; 8];
            stream.read_exact(&mut common)?;
            let (kind, header_len, pdo) = (common[0], common[2] as usize, common[3] as usize);
            let len = u32::from_le_bytes(common[4..8].try_into().unwrap()) as usize;
            let mut pdu = common.to_vec();
            pdu.resize(len, 0);
            stream.read_exact(&mut pdu[8..])?;
            if kind == 0x02 {
                self.lock().terminated += 1;
                return Ok(());
            }
            if header_digest > 0 {
                let digest = crc32c(&pdu[..header_len]).to_le_bytes();
                assert_eq!(pdu[header_len..header_len + 4], digest, "header digest");
            }
            let mut data = Vec::new();
            if pdo > 0 {
                data = pdu[pdo..len - data_digest].to_vec();
                if data_digest > 0 {
                    let digest = crc32c(&data).to_le_bytes();
                    assert_eq!(pdu[len - 4..], digest, "data digest");
                }
            }
            match kind {
                0x04 => {
                    let sqe: [u8; 64] = pdu[8..72].try_into().unwrap();
                    let is_asked_for = sqe[39] == 0x5a && sqe[0] & 3 == 1;
                    let number = self.lock().seen.len();
                    let command = Command { sqe, number };
                    self.lock().seen.push(command.clone());
                    if is_asked_for {
                        let len = command.data_len();
                        let half = len / 2 / 4 * 4;
                        // Asks for both halves at once: two R2Ts are outstanding.
                        for (ttag, offset, len) in [(1, 0, half), (2, half, len - half)] {
                            self.r2t(stream, command.cid(), ttag, offset, len)?;
                        }
                        writes.insert(command.cid(), (command, Vec::new()));
                    } else {
                        self.obey(stream, command, data)?;
                    }
                }
                0x06 => {
                    let cid = u16::from_le_bytes([pdu[8], pdu[9]]);
                    let (command, mut all) = writes.remove(&cid).expect("a write");
                    let offset = u32::from_le_bytes(pdu[12..16].try_into().unwrap());
                    assert_eq!(offset as usize, all.len(), "data in order");
                    all.extend_from_slice(&data);
                    match all.len() == command.data_len() {
                        true => self.obey(stream, command, all)?,
                        false => drop(writes.insert(cid, (command, all))),
                    }
                }
                other => panic!("PDU of type {other:#x}"),
            }
        }
    }

    fn obey(&self, stream: &TcpStream, command: Command, data: Vec<u8>) -> io::Result<()> {
        if matches!(command.opcode(), 0x0d | 0x11 | 0x15) {
            self.lock().keys.push(data.clone());
        }
        let what = (self.lock().script)(&command);
        let cut = || Err(io::Error::from(io::ErrorKind::ConnectionAborted));
        match what {
            Do::It => self.execute(stream, &command, data),
            Do::Fail(status) => self.respond(stream, &command, status),
            Do::Hold => {
                let clone = stream.try_clone()?;
                self.lock().held.push((command, clone));
                Ok(())
            }
            Do::Stall => {
                self.lock().stalled = true;
                while self.lock().stalled {
                    std::thread::yield_now();
                }
                Ok(())
            }
            Do::Cut => cut(),
            Do::ExecuteAndCut => {
                self.change(&command, &data);
                cut()
            }
            Do::SendHalf => {
                let data = self.data_of(&command);
                let half = data.len() / 2 / 4 * 4;
                let pdu = self.data_pdu(&command, 0, &data, true);
                { stream }.write_all(&pdu[..pdu.len() - half])
            }
            Do::WrongDigest => {
                let mut pdu = self.data_pdu(&command, 0, &self.data_of(&command), true);
                *pdu.last_mut().unwrap() ^= 1;
                { stream }.write_all(&pdu)?;
                self.respond(stream, &command, 0)
            }
            Do::Give(data) => {
                { stream }.write_all(&self.data_pdu(&command, 0, &data, true))?;
                self.respond(stream, &command, 0)
            }
            Do::Say(bytes) => { stream }.write_all(&bytes),
        }
    }

    fn range(&self, command: &Command) -> std::ops::Range<usize> {
        if !matches!(command.opcode(), 1 | 2 | 8) {
            return 0..0;
        }
        let start = command.slba() as usize * self.options.block;
        start..start + command.blocks() * self.options.block
    }

    fn data_of(&self, command: &Command) -> Vec<u8> {
        let range = self.range(command);
        self.disk.lock().unwrap()[range].to_vec()
    }

    fn change(&self, command: &Command, data: &[u8]) {
        let block = self.options.block;
        let range = self.range(command);
        let mut disk = self.disk.lock().unwrap();
        match command.opcode() {
            0x01 => disk[range].copy_from_slice(data),
            0x08 => disk[range].fill(0),
            0x09 => {
                let ranges = usize::from(command.sqe[40]) + 1;
                for range in data.chunks_exact(16).take(ranges) {
                    let blocks = u32::from_le_bytes(range[4..8].try_into().unwrap());
                    let slba = u64::from_le_bytes(range[8..16].try_into().unwrap());
                    let start = slba as usize * block;
                    disk[start..start + blocks as usize * block].fill(0xdd);
                }
            }
            _ => {}
        }
    }

    fn execute(&self, mut stream: &TcpStream, command: &Command, data: Vec<u8>) -> io::Result<()> {
        if command.opcode() != 0x02 {
            self.change(command, &data);
            return self.respond(stream, command, 0);
        }
        let data = self.data_of(command);
        let mut offset = 0;
        for part in data.chunks(self.options.pdu) {
            let last = offset + part.len() == data.len();
            stream.write_all(&self.data_pdu(command, offset, part, last))?;
            offset += part.len();
        }
        self.respond(stream, command, 0)
    }

    fn data_pdu(&self, command: &Command, offset: usize, data: &[u8], last: bool) -> Vec<u8> {
        let (header_digest, data_digest) = self.digests();
        let pdo = 24 + header_digest;
        let mut pdu = self.header(0x07, 24, pdo as u8, pdo + data.len() + data_digest);
        pdu[1] |= u8::from(last) << 2 | u8::from(data_digest > 0) << 1;
        pdu[8..10].copy_from_slice(&command.cid().to_le_bytes());
        pdu[12..16].copy_from_slice(&(offset as u32).to_le_bytes());
        pdu[16..20].copy_from_slice(&(data.len() as u32).to_le_bytes());
        self.sign(&mut pdu);
        pdu.extend_from_slice(data);
        if data_digest > 0 {
            pdu.extend_from_slice(&crc32c(data).to_le_bytes());
        }
        pdu
    }

    fn respond(&self, mut stream: &TcpStream, command: &Command, status: u16) -> io::Result<()> {
        let mut pdu = self.header(0x05, 24, 0, 24 + self.digests().0);
        pdu[20..22].copy_from_slice(&command.cid().to_le_bytes());
        pdu[22..24].copy_from_slice(&(status << 1).to_le_bytes());
        self.sign(&mut pdu);
        stream.write_all(&pdu)
    }

    fn r2t(
        &self,
        mut stream: &TcpStream,
        cid: u16,
        ttag: u16,
        offset: usize,
        len: usize,
    ) -> io::Result<()> {
        let mut pdu = self.header(0x09, 24, 0, 24 + self.digests().0);
        pdu[8..10].copy_from_slice(&cid.to_le_bytes());
        pdu[10..12].copy_from_slice(&ttag.to_le_bytes());
        pdu[12..16].copy_from_slice(&(offset as u32).to_le_bytes());
        pdu[16..20].copy_from_slice(&(len as u32).to_le_bytes());
        self.sign(&mut pdu);
        stream.write_all(&pdu)
    }

    fn header(&self, kind: u8, len: u8, pdo: u8, total: usize) -> Vec<u8> {
        let mut pdu = vec![0; len.into()];
        pdu[0] = kind;
        pdu[1] = u8::from(self.options.header_digest);
        pdu[2] = len;
        pdu[3] = pdo;
        pdu[4..8].copy_from_slice(&(total as u32).to_le_bytes());
        pdu
    }

    fn sign(&self, pdu: &mut Vec<u8>) {
        if self.options.header_digest {
            let digest = crc32c(pdu);
            pdu.extend_from_slice(&digest.to_le_bytes());
        }
    }
}

/// By a table that is made bit by bit.
pub fn crc32c(bytes: &[u8]) -> u32 {
    static TABLE: [u32; 256] = table();
    let step = |crc: u32, byte: &u8| crc >> 8 ^ TABLE[usize::from(crc as u8 ^ byte)];
    !bytes.iter().fold(!0, step)
}

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let (mut crc, mut bit) = (byte as u32, 0);
        while bit < 8 {
            crc = crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
}
