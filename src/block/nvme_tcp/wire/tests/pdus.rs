//! The handshake's PDUs, and the layout of all of them.

use super::super::pdu::*;
use super::super::{FatalErrorStatus, ProtocolError, Violation};
use super::put;

fn fatal<T: std::fmt::Debug>(result: Result<T, ProtocolError>) -> (FatalErrorStatus, u32) {
    let error = result.expect_err("an error");
    error.fatal_error().expect("one that is answered")
}

const ASKED: ICReq = ICReq {
    hpda: 0,
    header_digest: true,
    data_digest: true,
    max_r2t: 0,
};

#[test]
fn an_icreq_has_the_bytes_of_the_specification() {
    let request = ICReq {
        hpda: 3,
        header_digest: true,
        data_digest: false,
        max_r2t: 0x0102_0304,
    };
    // TCP 3.6.2.2, figure 20.
    let mut bytes = [0; 128];
    put(&mut bytes, 0, &[0, 0, 128, 0, 128, 0, 0, 0]);
    put(&mut bytes, 8, &[0, 0, 3, 1, 4, 3, 2, 1]);
    assert_eq!(request.encode(), bytes);
    assert_eq!(ICReq::decode(&bytes).expect("valid"), request);
    put(&mut bytes, 11, &[2]);
    assert!(ICReq::decode(&bytes).expect("valid").data_digest);
}

#[test]
fn an_icresp_has_the_bytes_of_the_specification() {
    let response = ICResp {
        cpda: 31,
        header_digest: true,
        data_digest: true,
        max_h2c_data: 0x0002_0000,
    };
    // TCP 3.6.2.3, figure 21.
    let mut bytes = [0; 128];
    put(&mut bytes, 0, &[1, 0, 128, 0, 128, 0, 0, 0]);
    put(&mut bytes, 8, &[0, 0, 31, 3, 0, 0, 2, 0]);
    assert_eq!(response.encode(), bytes);
    let decoded = ICResp::decode(&bytes, &ASKED).expect("valid");
    assert_eq!(decoded, response);
    assert_eq!(decoded.host_pdu_alignment(), 128);
    // What is reserved does not matter.
    put(&mut bytes, 1, &[0xff]);
    put(&mut bytes, 3, &[0xff]);
    put(&mut bytes, 11, &[0xff]);
    put(&mut bytes, 16, &[0xff; 112]);
    assert_eq!(ICResp::decode(&bytes, &ASKED).expect("valid"), response);
}

#[test]
fn an_icresp_with_a_field_that_can_not_be_is_refused_with_its_offset() {
    use FatalErrorStatus::{InvalidPduHeaderField, PduSequenceError};
    let good = ICResp {
        cpda: 0,
        header_digest: false,
        data_digest: false,
        max_h2c_data: 4096,
    }
    .encode();
    for (at, bytes, expected) in [
        (0, &[8_u8][..], (InvalidPduHeaderField, 0)),
        (0, &[0], (PduSequenceError, 0)),
        (0, &[7], (InvalidPduHeaderField, 2)),
        (2, &[127], (InvalidPduHeaderField, 2)),
        (2, &[24], (InvalidPduHeaderField, 2)),
        (4, &[127], (InvalidPduHeaderField, 4)),
        (4, &[128, 0, 0, 1], (InvalidPduHeaderField, 4)),
        (8, &[1], (InvalidPduHeaderField, 8)),
        (8, &[0, 1], (InvalidPduHeaderField, 8)),
        (10, &[32], (InvalidPduHeaderField, 10)),
        (12, &[0xff, 0x0f], (InvalidPduHeaderField, 12)),
        (12, &[0x02, 0x10], (InvalidPduHeaderField, 12)),
        (12, &[0, 0, 0, 0], (InvalidPduHeaderField, 12)),
    ] {
        let mut wrong = good;
        put(&mut wrong, at, bytes);
        assert_eq!(
            fatal(ICResp::decode(&wrong, &ASKED)),
            expected,
            "{at}: {bytes:?}"
        );
    }
    // Several errors: the first offset is told (TCP 3.6.2.4).
    let mut wrong = good;
    put(&mut wrong, 10, &[32]);
    put(&mut wrong, 12, &[0, 0, 0, 0]);
    let error = ICResp::decode(&wrong, &ASKED).expect_err("an error");
    assert_eq!(error.fatal_error(), Some((InvalidPduHeaderField, 10)));
    // The TermReq carries all 128 bytes of it: 152 in all, the most that is allowed.
    assert_eq!(error.term_req().len(), MAX_TERM_REQ);
    assert_eq!(error.term_req()[24..], wrong);
}

#[test]
fn a_digest_that_nobody_asked_for_is_refused_and_one_that_is_not_given_is_not() {
    for asked in 0..4_u8 {
        let request = ICReq {
            header_digest: asked & 1 != 0,
            data_digest: asked & 2 != 0,
            ..ASKED
        };
        for given in 0..4_u8 {
            let response = ICResp {
                cpda: 0,
                header_digest: given & 1 != 0,
                data_digest: given & 2 != 0,
                max_h2c_data: 4096,
            };
            let decoded = ICResp::decode(&response.encode(), &request);
            if given & !asked == 0 {
                assert_eq!(decoded.expect("valid"), response);
            } else {
                let expected = (FatalErrorStatus::InvalidPduHeaderField, 11);
                assert_eq!(fatal(decoded), expected);
            }
        }
    }
}

#[test]
fn a_c2h_term_req_instead_of_an_icresp_says_why() {
    let mut bytes = [0; 128];
    put(
        &mut bytes,
        0,
        &[3, 0, 24, 0, 152, 0, 0, 0, 6, 0, 8, 0, 0, 0],
    );
    let error = ICResp::decode(&bytes, &ASKED).expect_err("an error");
    let expected = Violation::Terminated { fes: 6, fei: 8 };
    assert_eq!(*error.violation(), expected);
    assert!(
        error.to_string().contains("Unsupported Parameter"),
        "{error}"
    );
    assert_eq!(error.fatal_error(), None);
    put(&mut bytes, 8, &[9]);
    let error = ICResp::decode(&bytes, &ASKED).expect_err("an error");
    assert!(error.to_string().contains("unknown status 0x9"), "{error}");
}

/// Every common header with each of these types, flags, lengths and offsets gives a layout that fits into
/// PLEN, or an error that says which field it was.
#[test]
fn a_layout_always_fits_into_the_pdu() {
    let mut given = 0;
    for header_digest in [false, true] {
        for data_digest in [false, true] {
            for alignment in [4, 12, 128] {
                let agreed = Agreed {
                    header_digest,
                    data_digest,
                    alignment,
                };
                for pdu_type in 0..=12 {
                    for flags in 0..16 {
                        for hlen in [0, 8, 24, 72, 128, 255] {
                            for pdo in [0, 1, 20, 24, 27, 28, 36, 72, 76, 128, 252, 255] {
                                for plen in
                                    [0, 7, 24, 28, 72, 76, 80, 128, 152, 153, 5000, u32::MAX]
                                {
                                    let header = CommonHeader {
                                        pdu_type,
                                        flags,
                                        hlen,
                                        pdo,
                                        plen,
                                    };
                                    given += u32::from(layout_fits(&header, &agreed));
                                }
                            }
                        }
                    }
                }
            }
        }
    }
    assert!(given > 1000, "{given} were right");
}

fn layout_fits(header: &CommonHeader, agreed: &Agreed) -> bool {
    let bytes = header.encode();
    assert_eq!(CommonHeader::decode(&bytes), *header);
    let from_controller = header.pdu_type & 1 == 1;
    match header.layout(agreed, from_controller, &bytes) {
        Ok(layout) => {
            let parts = layout.header_len + layout.padding + layout.data_len + layout.digest_len;
            assert_eq!(parts as u64, u64::from(header.plen), "{header:?}");
            assert_eq!(layout.pdu as u8, header.pdu_type);
            true
        }
        Err(error) => {
            assert_eq!(error.header(), bytes);
            if let Some((status, information)) = error.fatal_error() {
                assert!(information <= 4);
                assert!(matches!(
                    status,
                    FatalErrorStatus::InvalidPduHeaderField | FatalErrorStatus::PduSequenceError
                ));
                assert_eq!(error.term_req().len(), 32);
            }
            false
        }
    }
}

#[test]
fn more_padding_than_needed_is_taken() {
    let agreed = Agreed {
        header_digest: false,
        data_digest: false,
        alignment: 4,
    };
    let header = CommonHeader {
        pdu_type: 7,
        flags: 0,
        hlen: 24,
        pdo: 128,
        plen: 640,
    };
    let layout = header.layout(&agreed, true, &[]).expect("valid");
    assert_eq!((layout.padding, layout.data_len), (104, 512));
}

#[test]
fn errors_say_what_was_wrong_and_where() {
    for (violation, text) in [
        (
            Violation::UnknownCommand {
                pdu: PduType::R2T,
                cid: 0x1234,
            },
            "R2T for command 0x1234, which is not under way",
        ),
        (
            Violation::OutOfRange {
                pdu: PduType::C2HData,
                cid: 1,
                offset: 4096,
                length: 512,
                size: 4096,
            },
            "C2HData for command 0x0001: 512 bytes at offset 4096 of 4096",
        ),
        (
            Violation::HeaderDigest {
                pdu: PduType::CapsuleResp,
                received: 1,
                computed: 2,
            },
            "CapsuleResp with a header digest of 0x00000001, not 0x00000002",
        ),
        (Violation::UnknownType(8), "PDU of unknown type 0x08"),
    ] {
        assert_eq!(ProtocolError::new(violation, &[]).to_string(), text);
    }
    // Of a header digest that is wrong, what came is the information (TCP 3.6.2.4).
    let violation = Violation::HeaderDigest {
        pdu: PduType::R2T,
        received: 0x0102_0304,
        computed: 0,
    };
    let term = ProtocolError::new(violation, &[9; 28]).term_req();
    assert_eq!(term[..14], [2, 0, 24, 0, 52, 0, 0, 0, 3, 0, 4, 3, 2, 1]);
}
