//! The host side of one connected I/O queue, without I/O.

/// What the transport's handshake agreed on, for one queue.
#[derive(Clone, Copy, Debug)]
pub struct QueueParams {
    /// Commands that may be outstanding (submission queue entries - 1), 1 to 65534.
    pub depth: u16,
    /// PDUs have header digests.
    pub header_digest: bool,
    /// PDUs have data digests.
    pub data_digest: bool,
    /// Data of the PDUs that we send begins at a multiple of this many bytes (CPDA), 4 to 128.
    pub host_pdu_alignment: u32,
    /// Data of the PDUs that come begins at a multiple of this many bytes (HPDA), 4 to 128.
    pub controller_pdu_alignment: u32,
    /// Largest data of one H2CData PDU, bytes (MAXH2CDATA); at least 4096.
    pub max_h2c_data: u32,
    /// Largest in-capsule data, bytes; 0: none.
    pub in_capsule: u32,
    /// R2Ts that may be outstanding for a command.
    pub max_r2t: u32,
}
