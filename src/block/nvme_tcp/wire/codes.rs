//! Numbers of commands, and of what they ask for.

/// Opcodes of the Admin command set (Base 5, figure 138).
pub mod admin {
    /// Get Log Page.
    pub const GET_LOG_PAGE: u8 = 0x02;
    /// Identify.
    pub const IDENTIFY: u8 = 0x06;
    /// Abort.
    pub const ABORT: u8 = 0x08;
    /// Set Features.
    pub const SET_FEATURES: u8 = 0x09;
    /// Get Features.
    pub const GET_FEATURES: u8 = 0x0a;
    /// Asynchronous Event Request.
    pub const ASYNC_EVENT_REQUEST: u8 = 0x0c;
    /// Keep Alive.
    pub const KEEP_ALIVE: u8 = 0x18;
}

/// Opcodes of the NVM command set (NVM 3.1, Base 7).
pub mod nvm {
    /// Flush.
    pub const FLUSH: u8 = 0x00;
    /// Write.
    pub const WRITE: u8 = 0x01;
    /// Read.
    pub const READ: u8 = 0x02;
    /// Write Zeroes.
    pub const WRITE_ZEROES: u8 = 0x08;
    /// Dataset Management.
    pub const DATASET_MANAGEMENT: u8 = 0x09;
    /// Reservation Register.
    pub const RESERVATION_REGISTER: u8 = 0x0d;
    /// Reservation Report.
    pub const RESERVATION_REPORT: u8 = 0x0e;
    /// Reservation Acquire.
    pub const RESERVATION_ACQUIRE: u8 = 0x11;
    /// Reservation Release.
    pub const RESERVATION_RELEASE: u8 = 0x15;
}

/// The Fabrics command set: one opcode, and a type (Base 6).
pub mod fabrics {
    /// The opcode of them all.
    pub const OPCODE: u8 = 0x7f;
    /// FCTYPE: Property Set.
    pub const PROPERTY_SET: u8 = 0x00;
    /// FCTYPE: Connect.
    pub const CONNECT: u8 = 0x01;
    /// FCTYPE: Property Get.
    pub const PROPERTY_GET: u8 = 0x04;
    /// FCTYPE: Authentication Send.
    pub const AUTHENTICATION_SEND: u8 = 0x05;
    /// FCTYPE: Authentication Receive.
    pub const AUTHENTICATION_RECEIVE: u8 = 0x06;
    /// FCTYPE: Disconnect.
    pub const DISCONNECT: u8 = 0x08;
}

/// Identify: what is asked for (Base 5.17.1, figure 273).
pub mod cns {
    /// Identify Namespace.
    pub const NAMESPACE: u8 = 0x00;
    /// Identify Controller.
    pub const CONTROLLER: u8 = 0x01;
    /// Active Namespace ID list.
    pub const ACTIVE_NAMESPACES: u8 = 0x02;
    /// Namespace Identification Descriptor list.
    pub const NAMESPACE_DESCRIPTORS: u8 = 0x03;
    /// Identify Controller of an I/O command set.
    pub const COMMAND_SET_CONTROLLER: u8 = 0x06;
}

/// Log pages (Base 5.16.1, figure 202).
pub mod log {
    /// Changed Namespace List.
    pub const CHANGED_NAMESPACES: u8 = 0x04;
    /// Asymmetric Namespace Access.
    pub const ANA: u8 = 0x0c;
    /// Discovery.
    pub const DISCOVERY: u8 = 0x70;
}

/// Features (Base 5.27.1, figure 317).
pub mod feature {
    /// Volatile Write Cache.
    pub const VOLATILE_WRITE_CACHE: u8 = 0x06;
    /// Number of Queues.
    pub const NUMBER_OF_QUEUES: u8 = 0x07;
    /// Asynchronous Event Configuration.
    pub const ASYNC_EVENT_CONFIGURATION: u8 = 0x0b;
    /// Keep Alive Timer.
    pub const KEEP_ALIVE_TIMER: u8 = 0x0f;
    /// Host Behavior Support.
    pub const HOST_BEHAVIOR_SUPPORT: u8 = 0x16;
    /// Host Identifier.
    pub const HOST_IDENTIFIER: u8 = 0x81;
}

/// Controller properties, by offset (Base 3.1.3).
pub mod property {
    /// Controller Capabilities, 8 bytes.
    pub const CAP: u32 = 0x00;
    /// Version, 4 bytes.
    pub const VS: u32 = 0x08;
    /// Controller Configuration, 4 bytes.
    pub const CC: u32 = 0x14;
    /// Controller Status, 4 bytes.
    pub const CSTS: u32 = 0x1c;
    /// NVM Subsystem Reset, 4 bytes.
    pub const NSSR: u32 = 0x20;
    /// Controller Ready Timeouts, 4 bytes.
    pub const CRTO: u32 = 0x68;
}

/// The identifier of the NVM I/O command set (Base 4.1, figure 273: CSI).
pub const CSI_NVM: u8 = 0;
/// The namespace identifier that means all of them (Base 3.2.1).
pub const ALL_NAMESPACES: u32 = u32::MAX;
/// The admin commands that need a namespace identifier and have none use this.
pub const NO_NAMESPACE: u32 = 0;
